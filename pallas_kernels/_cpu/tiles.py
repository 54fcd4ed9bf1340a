"""A matmul of small row-major blocks: register tiles of at most 6 rows by 4 vectors, as in BLIS.

Every element of C is one chain of multiply-adds in the order of the contraction, whatever tile it falls into, so a
row's result does not depend on how many rows go with it.
"""

import functools
import itertools

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pallas_kernels._cpu.memory import F32, I8, I32, I64, jit
from pallas_kernels._cpu.register import compile_function
from pallas_kernels._cpu.vector import (
    LANES,
    REGISTERS,
    llvm_function,
    load,
    multiply_add,
    splat,
    store,
    vector_type,
)

# 24 (or 12) accumulators, the vectors of one row of B, and one broadcast: all in registers.
TILE_ROWS = 6
TILE_COLUMNS = LANES * (4 if REGISTERS == 32 else 2)
# Widths of column tiles, widest first; all columns are multiples of 8.
WIDTHS = tuple(w for w in (64, 32, 16, 8) if w <= TILE_COLUMNS)
STREAM_WIDTHS = tuple(w for w in (64, 16, 8) if w <= TILE_COLUMNS)
# Rows of B that the prefetch runs ahead: about 400 cycles of a full tile.
AHEAD = 32

# Stand for the element type of B where a function is typed by it; a bfloat16 is a uint16 to numba.
FLOAT32, BFLOAT16 = np.float32(0), np.uint16(0)

# What a tile does besides multiplying: nothing; ask memory for later rows of B; that and copy B (as float32) aside.
PLAIN, STREAM, PACK = 0, 1, 2

# The tiles are one library, compiled apart: numba would compile them again into every function on the way up.
FLOAT32_SYMBOL, BFLOAT16_SYMBOL = "pallas_kernels_tiles_float32", "pallas_kernels_tiles_bfloat16"
_published: list = []


def _i8(builder, address):
    return builder.inttoptr(address, I8.as_pointer())


def _tile_function(module, rows, width, bf16, kind):
    """void(C, ldc, A, lda, B, ldb, depth, accumulate, next, pack), strides in bytes; made once per module."""
    name = f"tile_{rows}_{width}_{'bf16' if bf16 else 'f32'}_{kind}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 10), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    c, ldc, a, lda, b, ldb, depth, accumulate, next_b, pack = function.args
    lanes = min(LANES, width)
    vectors = width // lanes
    size = 2 if bf16 else 4
    entry, loop, end = (function.append_basic_block(n) for n in ("entry", "loop", "end"))

    builder = ir.IRBuilder(entry)
    c_rows = [_i8(builder, builder.add(c, builder.mul(ldc, ir.Constant(I64, i)))) for i in range(rows)]
    a_rows = [_i8(builder, builder.add(a, builder.mul(lda, ir.Constant(I64, i)))) for i in range(rows)]
    b_start, pack_start = _i8(builder, b), _i8(builder, pack)
    next_start = _i8(builder, next_b)
    ahead = _i8(builder, builder.add(b, builder.mul(ldb, ir.Constant(I64, AHEAD))))
    switch_at = builder.sub(depth, ir.Constant(I64, AHEAD))
    ahead = builder.select(builder.icmp_signed("<=", switch_at, ir.Constant(I64, 0)), next_start, ahead)
    keep = builder.icmp_signed("!=", accumulate, ir.Constant(I64, 0))
    zero = ir.Constant(vector_type(lanes), [0.0] * lanes)
    with builder.if_else(keep) as (then, otherwise):
        with then:
            olds = [
                load(builder, builder.gep(row, [ir.Constant(I64, 4 * lanes * j)]), lanes)
                for row in c_rows
                for j in range(vectors)
            ]
            then_block = builder.block
        with otherwise:
            else_block = builder.block
    starts = []
    for old in olds:
        phi = builder.phi(old.type)
        phi.add_incoming(old, then_block)
        phi.add_incoming(zero, else_block)
        starts.append(phi)
    before = builder.block
    builder.branch(loop)

    builder.position_at_end(loop)

    def looped(start):
        phi = builder.phi(start.type)
        phi.add_incoming(start, before)
        return phi

    k, b_at = looped(ir.Constant(I64, 0)), looped(b_start)
    pack_at = looped(pack_start) if kind == PACK else None
    ahead_at = looped(ahead) if kind != PLAIN else None
    sums = [looped(start) for start in starts]
    b_row = [
        load(builder, builder.gep(b_at, [ir.Constant(I64, size * lanes * j)]), lanes, bf16)
        for j in range(vectors)
    ]
    if kind == PACK:
        for j, vector in enumerate(b_row):
            store(builder, vector, builder.gep(pack_at, [ir.Constant(I64, 4 * lanes * j)]))
    if kind != PLAIN:
        for offset in range(0, width * size, 64):
            _prefetch(builder, builder.gep(ahead_at, [ir.Constant(I64, offset)]))
    k_bytes = builder.shl(k, ir.Constant(I64, 2))
    news = []
    for i in range(rows):
        value = builder.load(builder.bitcast(builder.gep(a_rows[i], [k_bytes]), F32.as_pointer()), align=4)
        value = splat(builder, value, lanes)
        news += [multiply_add(builder, value, b_row[j], sums[i * vectors + j]) for j in range(vectors)]
    k_next = builder.add(k, ir.Constant(I64, 1))
    here = builder.block
    k.add_incoming(k_next, here)
    b_at.add_incoming(builder.gep(b_at, [ldb]), here)
    if kind == PACK:
        pack_at.add_incoming(builder.gep(pack_at, [ir.Constant(I64, 4 * width)]), here)
    if kind != PLAIN:
        switch = builder.icmp_signed("==", k_next, switch_at)
        ahead_at.add_incoming(builder.select(switch, next_start, builder.gep(ahead_at, [ldb])), here)
    for phi, new in zip(sums, news, strict=True):
        phi.add_incoming(new, here)
    builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, end)

    builder.position_at_end(end)
    for i in range(rows):
        for j in range(vectors):
            store(builder, news[i * vectors + j], builder.gep(c_rows[i], [ir.Constant(I64, 4 * lanes * j)]))
    builder.ret_void()
    return function


def _prefetch(builder, i8_pointer):
    parameters = [I8.as_pointer(), I32, I32, I32]
    prefetch = llvm_function(builder.module, "llvm.prefetch.p0", ir.VoidType(), parameters)
    # read, into the second level (a first level of 48 KiB would lose it again), data
    builder.call(prefetch, [i8_pointer, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])


@jit
def tile_key(kind, width, rows):
    """One number for the switch of the tiles."""
    return kind * 1024 + width * 8 + rows


def _tile_switch(kinds_and_widths, bf16):
    """An intrinsic that calls the tile function that `which` names."""

    @intrinsic
    def run(typingctx, which, c, ldc, a, lda, b, ldb, depth, accumulate, next_b, pack):
        def codegen(context, builder, signature, args):
            done = builder.append_basic_block("tile_done")
            switch = builder.switch(args[0], done)
            for kind, widths in kinds_and_widths:
                # The first of several chunks of rows is never short, see stream_tile.
                for width, rows in itertools.product(widths, range(4 if kind == PACK else 1, TILE_ROWS + 1)):
                    function = _tile_function(builder.module, rows, width, bf16, kind)
                    block = builder.append_basic_block("tile")
                    switch.add_case(ir.Constant(I64, tile_key.py_func(kind, width, rows)), block)
                    with builder.goto_block(block):
                        builder.call(function, args[1:])
                        builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    return run


_float32_switch = _tile_switch([(PLAIN, WIDTHS), (STREAM, STREAM_WIDTHS), (PACK, STREAM_WIDTHS)], bf16=False)
_bfloat16_switch = _tile_switch([(STREAM, STREAM_WIDTHS), (PACK, STREAM_WIDTHS)], bf16=True)


def float32_tiles(version: int):
    """All tiles with a float32 B as one C function; see register.compile_function."""

    def tiles(which, c, ldc, a, lda, b, ldb, depth, accumulate, next_b, pack):
        if version != 0:
            _float32_switch(which, c, ldc, a, lda, b, ldb, depth, accumulate, next_b, pack)

    return tiles


def bfloat16_tiles(version: int):
    """All tiles with a bfloat16 B as one C function."""

    def tiles(which, c, ldc, a, lda, b, ldb, depth, accumulate, next_b, pack):
        if version != 0:
            _bfloat16_switch(which, c, ldc, a, lda, b, ldb, depth, accumulate, next_b, pack)

    return tiles


@functools.cache
def publish() -> None:
    """Compiles the tiles and makes them known to the linker, before any kernel that calls them is compiled."""
    for name, factory in ((FLOAT32_SYMBOL, float32_tiles), (BFLOAT16_SYMBOL, bfloat16_tiles)):
        compiled = compile_function(factory, types.void(*[types.int64] * 11))
        _published.append(compiled)
        llvm.add_symbol(name, compiled.address)


@intrinsic
def _run_tile(typingctx, tag, which, c, ldc, a, lda, b, ldb, depth, accumulate, next_b, pack):
    """One register tile; tag is a float32 for a float32 B, a uint16 for a bfloat16 B."""
    symbol = BFLOAT16_SYMBOL if tag == types.uint16 else FLOAT32_SYMBOL

    def codegen(context, builder, signature, args):
        function = llvm_function(builder.module, symbol, ir.VoidType(), [I64] * 11)
        builder.call(function, args[1:])
        return context.get_dummy_value()

    return types.void(tag, *[types.int64] * 11), codegen


@jit
def _plain_width(columns):
    """The widest tile that fits into `columns`, a positive multiple of 8."""
    width = TILE_COLUMNS
    while width > columns:
        width //= 2
    return width


@jit
def stream_width(columns):
    """The widest streaming tile that fits into `columns`, a positive multiple of 8."""
    if columns >= TILE_COLUMNS:
        return TILE_COLUMNS
    return 16 if columns >= 16 else 8


@jit
def matmul(c, ldc, a, lda, b, ldb, rows, columns, depth, accumulate):
    """C[rows, columns] (+)= A[rows, depth] @ B[depth, columns], float32, B near the core; ld* in bytes."""
    done = 0
    while done < columns:
        width = _plain_width(columns - done)
        for first in range(0, rows, TILE_ROWS):
            which = tile_key(PLAIN, width, min(TILE_ROWS, rows - first))
            c_at, a_at = c + first * ldc + 4 * done, a + first * lda
            _run_tile(FLOAT32, which, c_at, ldc, a_at, lda, b + 4 * done, ldb, depth, accumulate, 0, 0)
        done += width


@jit
def stream_tile(tag, c, ldc, a, lda, b, ldb, rows, width, depth, accumulate, next_b, pack):
    """One column tile of any number of rows of A. B comes from memory: it is read once, prefetched, on to next_b,
    and packed at `pack` (float32 [depth, width]) where more than one tile of rows needs it.
    """
    chunks = (rows + TILE_ROWS - 1) // TILE_ROWS
    first = 0
    for chunk in range(chunks):
        n = (rows - first + chunks - chunk - 1) // (chunks - chunk)
        c_at, a_at = c + first * ldc, a + first * lda
        if chunk > 0:
            which = tile_key(PLAIN, width, n)
            _run_tile(FLOAT32, which, c_at, ldc, a_at, lda, pack, 4 * width, depth, accumulate, 0, 0)
        else:
            which = tile_key(STREAM if chunks == 1 else PACK, width, n)
            _run_tile(tag, which, c_at, ldc, a_at, lda, b, ldb, depth, accumulate, next_b, pack)
        first += n
