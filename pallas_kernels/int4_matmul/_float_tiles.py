"""LLVM code of int4_matmul with float32 activations: a few rows of them times a panel of outputs opened to floats in registers.

A tile reads its arguments from int64 words in memory, in the order of WORDS. Strides are in bytes.
"""

import functools
import itertools

from llvmlite import ir

from pallas_kernels._cpu.bytes import load_bytes
from pallas_kernels._cpu.code import (
    LANES,
    address_of,
    load,
    loop,
    multiply_add,
    prefetch,
    splat,
    vector_type,
)
from pallas_kernels._cpu.memory import F32, I32
from pallas_kernels.int4_matmul._tiles import (
    AHEAD,
    ROWS,
    lane_sum,
    read_scalar,
    sums,
    switch,
    tile_function,
    tile_key,
)

HALVES = (64, 32, 16, 8)  # bytes of a packing block: half its channels

# As in LOW_WORDS; `blocks` are those of a group.
WORDS = (
    "out", "out_row", "x", "x_row", "w", "w_row", "scale", "scale_row", "shift", "groups", "blocks", "outputs",
)  # fmt: skip


def _tile(builder, word, *, rows, half):
    lanes = min(LANES, half)
    with loop(builder, word["outputs"], 1) as n:
        totals = sums(builder, rows, lanes, F32, 0.0)
        weights = builder.add(word["w"], builder.mul(n, word["w_row"]))
        scale_row = builder.mul(builder.ashr(n, word["shift"]), word["scale_row"])
        with loop(builder, word["groups"], 1) as g:
            # Two sums a row, so that one does not wait for the other.
            parts = [sums(builder, rows, lanes, F32, 0.0) for _ in range(2)]
            with loop(builder, word["blocks"], 1) as b:
                block = builder.add(builder.mul(g, word["blocks"]), b)
                prefetch(builder, address_of(builder, weights, (block, half), AHEAD))
                for begin in range(0, half, lanes):
                    packed = load_bytes(builder, address_of(builder, weights, (block, half), begin), lanes)
                    for part, codes in enumerate(_codes(builder, packed)):
                        at = 4 * (part * half + begin)
                        for r in range(rows):
                            x = address_of(builder, word["x"], (word["x_row"], r), (block, 8 * half), at)
                            place = parts[part][r]
                            total = multiply_add(builder, codes, load(builder, x, lanes), builder.load(place))
                            builder.store(total, place)
            scale = read_scalar(builder, address_of(builder, word["scale"], scale_row, (g, 4)))
            scale = splat(builder, scale, lanes)
            for r in range(rows):
                both = builder.fadd(*(builder.load(part[r]) for part in parts))
                builder.store(multiply_add(builder, both, scale, builder.load(totals[r])), totals[r])
        for r in range(rows):
            out = address_of(builder, word["out"], (word["out_row"], r), (n, 4))
            total = lane_sum(builder, builder.load(totals[r]))
            builder.store(total, builder.bitcast(out, F32.as_pointer()), align=4)


def _codes(builder, packed):
    """Both halves of the bytes of `matrix.pack` as float32."""
    lanes = packed.type.count
    integers, floats = vector_type(lanes, I32), vector_type(lanes)

    def constant(value):
        return ir.Constant(integers, [value] * lanes)

    low = builder.sub(builder.and_(builder.zext(packed, integers), constant(15)), constant(8))
    high = builder.ashr(builder.sext(packed, integers), constant(4))
    return builder.sitofp(low, floats), builder.sitofp(high, floats)


def _tiles(module):
    for rows, half in itertools.product(ROWS, HALVES):
        emit = functools.partial(_tile, rows=rows, half=half)
        yield (
            tile_key.py_func(rows, half, 0),
            tile_function(module, f"float_{rows}_{half}", WORDS, emit),
        )


run_float = switch(_tiles)
