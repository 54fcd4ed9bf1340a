"""LLVM code of one register tile of a matmul: a few rows by a few vectors, all accumulators in registers (BLIS)."""

from llvmlite import ir

from pallas_kernels._cpu.code import (
    LANES,
    REGISTERS,
    address_of,
    constant,
    load,
    loop,
    multiply_add,
    prefetch,
    splat,
    store,
    vector_type,
)
from pallas_kernels._cpu.memory import F32, I64

# 24 (or 12) accumulators, the vectors of one row of B, and one broadcast: all in registers.
TILE_ROWS = 6
TILE_COLUMNS = LANES * (4 if REGISTERS == 32 else 2)

# What a tile does besides multiplying.
# PLAIN: nothing. STREAM: ask memory for row k of the next block at step k. PACK: that for the first SHARE bytes of
# each row, and copy B aside as float32. REST: that for the next SHARE bytes, reading a packed B; so the requests are
# spread over the arithmetic of two tiles.
PLAIN, STREAM, PACK, REST = 0, 1, 2, 3
SHARE = 128


def tile_function(module, rows, width, bf16, kind):
    """void(C, ldc, A, lda, B, ldb, depth, accumulate, next, last), strides in bytes; depth > 0.

    C[rows, width] (+)= A[rows, depth] @ B[depth, width]; `last` is where PACK packs, for REST the stride of `next`.
    """
    name = f"tile_{rows}_{width}_{'bf16' if bf16 else 'f32'}_{kind}"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 10), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    c, ldc, a, lda, b, ldb, depth, accumulate, next_b, last = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    lanes = min(LANES, width)
    size = 2 if bf16 else 4
    places = [(i, j) for i in range(rows) for j in range(width // lanes)]
    # Stack places, which LLVM turns into registers.
    sums = {place: builder.alloca(vector_type(lanes)) for place in places}
    with builder.if_else(builder.icmp_signed("!=", accumulate, ir.Constant(I64, 0))) as (add, overwrite):
        with add:
            for i, j in places:
                builder.store(
                    load(builder, address_of(builder, c, (ldc, i), 4 * lanes * j), lanes), sums[i, j]
                )
        with overwrite:
            for place in places:
                builder.store(constant(0.0, lanes), sums[place])
    with loop(builder, depth, 1) as k:
        row = [
            load(builder, address_of(builder, b, (ldb, k), size * o), lanes, bf16)
            for o in range(0, width, lanes)
        ]
        if kind == PACK:
            for j, vector in enumerate(row):
                store(builder, vector, address_of(builder, last, (k, 4 * width), 4 * lanes * j))
        for offset in _requested(width * size, kind):
            prefetch(builder, address_of(builder, next_b, (last if kind == REST else ldb, k), offset))
        for i in range(rows):
            value = builder.bitcast(address_of(builder, a, (lda, i), (k, 4)), F32.as_pointer())
            value = splat(builder, builder.load(value, align=4), lanes)
            for j, vector in enumerate(row):
                builder.store(multiply_add(builder, value, vector, builder.load(sums[i, j])), sums[i, j])
    for i, j in places:
        store(builder, builder.load(sums[i, j]), address_of(builder, c, (ldc, i), 4 * lanes * j))
    builder.ret_void()
    return function


def _requested(row_bytes, kind):
    """Offsets of the lines of a row that a tile asks for."""
    begin, end = {PLAIN: (0, 0), STREAM: (0, row_bytes), PACK: (0, SHARE), REST: (SHARE, 2 * SHARE)}[kind]
    return range(begin, min(end, row_bytes), 64)
