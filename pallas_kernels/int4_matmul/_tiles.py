"""LLVM code of int4_matmul's inner loops: a few rows of activations times a panel of packed outputs, as numba intrinsics.

A tile reads its arguments from int64 words in memory, in the order of LOW_WORDS or HIGH_WORDS. Strides are in bytes.
"""

import functools
import itertools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pallas_kernels._cpu.bytes import byte_constant, dot_bytes, load_bytes, nibbles
from pallas_kernels._cpu.code import (
    address_of,
    llvm_function,
    loop,
    multiply_add,
    prefetch,
    splat,
    vector_type,
)
from pallas_kernels._cpu.memory import F32, I8, I32, I64, jit, pointer

ROWS = (8, 4, 1)  # of a tile, as many as are left
LOW_SIZES, HIGH_SIZES = (64, 32, 16, 8), (64, 32, 16)  # bytes of weights in a vector
AHEAD = 2048  # bytes of weights that are asked for before they are needed

# out [row, output]; x [row, channel]; start: sums to begin with [row, group, lane]; x_scale [row, group], whose groups
# may all be one (x_scale_group 0); weights; their scales, one for each 2**shift outputs; channel scales of two levels.
LOW_WORDS = (
    "out", "out_row", "x", "x_row", "start", "start_row", "x_scale", "x_scale_row", "x_scale_group", "w", "w_row",
    "scale", "scale_row", "shift", "channel", "groups", "blocks", "outputs",
)  # fmt: skip
HIGH_WORDS = (
    "out", "out_row", "x", "x_row", "start", "start_row", "x_scale", "x_scale_row", "w", "w_row", "scale",
    "vectors", "outputs",
)  # fmt: skip


def _words(builder, address, names):
    word = {}
    for place, name in enumerate(names):
        at = builder.add(address, ir.Constant(I64, 8 * place))
        word[name] = builder.load(pointer(builder, at, I64), align=8)
    return word


def read_scalar(builder, at, kind=F32):
    return builder.load(builder.bitcast(at, kind.as_pointer()), align=1)


def lane_sum(builder, value):
    """Sum of all lanes, of integers exactly."""
    count, element = value.type.count, value.type.element
    if element == I32:
        name = f"llvm.vector.reduce.add.v{count}i32"
        return builder.call(llvm_function(builder.module, name, I32, [value.type]), [value])
    while count > 1:
        count //= 2
        indices = [list(range(count)), list(range(count, 2 * count))]
        low, high = (
            builder.shuffle_vector(value, value, ir.Constant(vector_type(count, I32), part))
            for part in indices
        )
        value = builder.fadd(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


def variables(builder, count, kind):
    """Only what is allocated at a function's entry becomes registers."""
    with builder.goto_entry_block():
        return [builder.alloca(kind) for _ in range(count)]


def sums(builder, rows, lanes, element, zero):
    places = variables(builder, rows, vector_type(lanes, element))
    for place in places:
        builder.store(ir.Constant(vector_type(lanes, element), [zero] * lanes), place)
    return places


def _low_tile(builder, word, *, rows, size, two_level):
    """`size` bytes of weights at a time: a block of 2 * size channels."""
    lanes = max(size, 16) // 4
    floats, integers = vector_type(lanes), vector_type(lanes, I32)
    with loop(builder, word["outputs"], 1) as n:
        totals = sums(builder, rows, lanes, F32, 0.0)
        parts = variables(builder, rows, integers)
        weights = builder.add(word["w"], builder.mul(n, word["w_row"]))
        scale_row = builder.mul(builder.ashr(n, word["shift"]), word["scale_row"])
        with loop(builder, word["groups"], 1) as g:
            for r in range(rows):
                at = address_of(builder, word["start"], (word["start_row"], r), (g, 4 * lanes))
                builder.store(builder.load(builder.bitcast(at, integers.as_pointer()), align=4), parts[r])
            with loop(builder, word["blocks"], 1) as b:
                block = builder.add(builder.mul(g, word["blocks"]), b)
                at = address_of(builder, weights, (block, size))
                halves = nibbles(builder, load_bytes(builder, at, size))
                prefetch(builder, address_of(builder, weights, (block, size), AHEAD))
                if size < 16:  # both halves fill one vector
                    both = ir.Constant(vector_type(2 * size, I32), list(range(2 * size)))
                    halves = (builder.shuffle_vector(*halves, both),)
                for r in range(rows):
                    total = builder.load(parts[r])
                    for half, unsigned in enumerate(halves):
                        x = address_of(builder, word["x"], (word["x_row"], r), (block, 2 * size), half * size)
                        signed = load_bytes(builder, x, max(size, 16))
                        total = dot_bytes(builder, total, unsigned, signed)
                    builder.store(total, parts[r])
            if two_level:
                fine = read_scalar(builder, address_of(builder, word["scale"], scale_row, g), I8)
                scale = builder.uitofp(fine, F32)
            else:
                scale = read_scalar(builder, address_of(builder, word["scale"], scale_row, (g, 4)))
            wide = splat(builder, scale, lanes) if two_level else None
            for r in range(rows):
                factor = wide
                if factor is None:
                    at = address_of(
                        builder, word["x_scale"], (word["x_scale_row"], r), (word["x_scale_group"], g)
                    )
                    factor = splat(builder, builder.fmul(scale, read_scalar(builder, at)), lanes)
                part = builder.sitofp(builder.load(parts[r]), floats)
                builder.store(multiply_add(builder, part, factor, builder.load(totals[r])), totals[r])
        for r in range(rows):
            total = builder.load(totals[r])
            if two_level:
                # Every lane is a whole number below 2**24, so nothing was rounded; their sum may be larger.
                exact = lane_sum(builder, builder.fptosi(total, integers))
                row = read_scalar(builder, address_of(builder, word["x_scale"], (word["x_scale_row"], r)))
                column = read_scalar(builder, address_of(builder, word["channel"], (n, 4)))
                result = builder.fmul(builder.sitofp(exact, F32), builder.fmul(row, column))
            else:
                result = lane_sum(builder, total)
            out = address_of(builder, word["out"], (word["out_row"], r), (n, 4))
            builder.store(result, builder.bitcast(out, F32.as_pointer()), align=4)


def _high_tile(builder, word, *, rows, size):
    """Adds to out; `size` bytes of weights at a time."""
    lanes = size // 4
    integers = vector_type(lanes, I32)
    with loop(builder, word["outputs"], 1) as n:
        parts = variables(builder, rows, integers)
        for r in range(rows):
            at = address_of(builder, word["start"], (word["start_row"], r))
            builder.store(builder.load(builder.bitcast(at, integers.as_pointer()), align=4), parts[r])
        weights = builder.add(word["w"], builder.mul(n, word["w_row"]))
        with loop(builder, word["vectors"], 1) as v:
            packed = load_bytes(builder, address_of(builder, weights, (v, size)), size)
            prefetch(builder, address_of(builder, weights, (v, size), AHEAD))
            unsigned = builder.xor(packed, byte_constant(0x80, size))
            for r in range(rows):
                x = load_bytes(builder, address_of(builder, word["x"], (word["x_row"], r), (v, size)), size)
                builder.store(dot_bytes(builder, builder.load(parts[r]), unsigned, x), parts[r])
        column = read_scalar(builder, address_of(builder, word["scale"], (n, 4)))
        for r in range(rows):
            row = read_scalar(builder, address_of(builder, word["x_scale"], (word["x_scale_row"], r)))
            total = builder.sitofp(lane_sum(builder, builder.load(parts[r])), F32)
            out = address_of(builder, word["out"], (word["out_row"], r), (n, 4))
            out = builder.bitcast(out, F32.as_pointer())
            product = builder.fmul(total, builder.fmul(row, column))
            builder.store(builder.fadd(builder.load(out, align=4), product), out, align=4)


def tile_function(module, name, words, emit):
    """void(address of the words)"""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, _words(builder, function.args[0], words))
    builder.ret_void()
    return function


def _low_tiles(module):
    for rows, size, two_level in itertools.product(ROWS, LOW_SIZES, (False, True)):
        emit = functools.partial(_low_tile, rows=rows, size=size, two_level=two_level)
        yield (
            tile_key.py_func(rows, size, two_level),
            tile_function(module, f"low_{rows}_{size}_{two_level}", LOW_WORDS, emit),
        )


def _high_tiles(module):
    for rows, size in itertools.product(ROWS, HIGH_SIZES):
        emit = functools.partial(_high_tile, rows=rows, size=size)
        yield tile_key.py_func(rows, size, 0), tile_function(module, f"high_{rows}_{size}", HIGH_WORDS, emit)


@jit
def tile_key(rows, size, two_level):
    """One number for a tile."""
    return rows * 1024 + size * 2 + two_level


def switch(functions):
    """run(key, address of words): an intrinsic that calls the tile of the key."""

    @intrinsic
    def run(typingctx, which, address):
        def codegen(context, builder, signature, args):
            done = builder.append_basic_block("done")
            switch = builder.switch(args[0], done)
            for key, function in functions(builder.module):
                block = builder.append_basic_block("tile")
                switch.add_case(ir.Constant(I64, key), block)
                with builder.goto_block(block):
                    builder.call(function, [args[1]])
                    builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return run


run_low, run_high = switch(_low_tiles), switch(_high_tiles)


def _start_of(size: int):
    """start(to, x, vectors, offset): minus `offset` times the lane sums of `vectors` vectors of x, offset 8 or 128.

    Weights are multiplied as unsigned integers, offset above what they are; this takes it off again.
    """

    @intrinsic
    def run(typingctx, to, x, vectors, offset):
        def codegen(context, builder, signature, args):
            to, x, vectors, offset = args
            integers = vector_type(size // 4, I32)
            (place,) = sums(builder, 1, size // 4, I32, 0)
            factor = splat(builder, builder.trunc(offset, I8), size)
            with loop(builder, vectors, 1) as v:
                signed = load_bytes(builder, address_of(builder, x, (v, size)), size)
                builder.store(dot_bytes(builder, builder.load(place), factor, signed), place)
            total = builder.sub(ir.Constant(integers, [0] * (size // 4)), builder.load(place))
            at = builder.inttoptr(to, integers.as_pointer())
            builder.store(total, at, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return run


start_64, start_32, start_16 = _start_of(64), _start_of(32), _start_of(16)
