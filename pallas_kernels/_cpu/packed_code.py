"""LLVM code of a register tile whose B is integers with scales: bytes, or two signed nibbles in each.

The sums over the integers of a group are taken in float32, in the order of the contraction, and then scaled: one
multiplication for a group, not for each weight.
"""

from llvmlite import ir

from pallas_kernels._cpu.code import (
    LANES,
    address_of,
    constant,
    llvm_function,
    load,
    loop,
    multiply_add,
    prefetch,
    splat,
    store,
    vector_type,
)
from pallas_kernels._cpu.matmul_code import PACK
from pallas_kernels._cpu.memory import F32, I8, I32, I64


def packed_tile_function(module, rows, width, bits, kind):
    """void(C, ldc, A, lda, B, ldb, depth, scales, next, pack), strides in bytes; depth > 0.

    C[rows, width] (+)= (A[rows, depth] @ B[depth, width]) * scales[width], float32. The scales' address has its lowest bit
    set where C is added to. A line of B holds one row as int8, or two rows (an even and the odd one after it, in the
    low and the high half of each byte) as signed nibbles; ldb is from line to line. The lines at `next` are prefetched.
    PACK puts the integers aside at `pack` as float32 [depth, width].
    """
    function = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [I64] * 10), f"packed_{rows}_{width}_{bits}_{kind}"
    )
    function.linkage = "internal"
    function.attributes.add("noinline")
    c, ldc, a, lda, b, ldb, depth, tagged, next_b, pack = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    lanes = min(LANES, width)
    columns = range(width // lanes)
    places = [(i, j) for i in range(rows) for j in columns]
    sums = {place: builder.alloca(vector_type(lanes)) for place in places}
    for place in places:
        builder.store(constant(0.0, lanes), sums[place])
    rows_of_line = 8 // bits
    lines = builder.sdiv(depth, ir.Constant(I64, rows_of_line))
    with loop(builder, lines, 1) as line:
        raw = [_bytes(builder, address_of(builder, b, (ldb, line), lanes * j), lanes) for j in columns]
        prefetch(builder, address_of(builder, next_b, (ldb, line)))
        for part in range(rows_of_line):
            k = builder.add(builder.mul(line, ir.Constant(I64, rows_of_line)), ir.Constant(I64, part))
            row = [_integer(builder, vector, part, bits, lanes) for vector in raw]
            if kind == PACK:
                for j, vector in enumerate(row):
                    store(builder, vector, address_of(builder, pack, (k, 4 * width), 4 * lanes * j))
            for i in range(rows):
                value = builder.bitcast(address_of(builder, a, (lda, i), (k, 4)), F32.as_pointer())
                value = splat(builder, builder.load(value, align=4), lanes)
                for j, vector in enumerate(row):
                    builder.store(multiply_add(builder, value, vector, builder.load(sums[i, j])), sums[i, j])
    scales = [
        load(builder, address_of(builder, builder.and_(tagged, ir.Constant(I64, -2)), 4 * lanes * j), lanes)
        for j in columns
    ]
    with builder.if_else(builder.trunc(tagged, ir.IntType(1))) as (add, overwrite):
        with add:
            for i, j in places:
                at = address_of(builder, c, (ldc, i), 4 * lanes * j)
                total = multiply_add(builder, builder.load(sums[i, j]), scales[j], load(builder, at, lanes))
                store(builder, total, at)
        with overwrite:
            for i, j in places:
                scaled = builder.fmul(builder.load(sums[i, j]), scales[j])
                store(builder, scaled, address_of(builder, c, (ldc, i), 4 * lanes * j))
    builder.ret_void()
    return function


def _bytes(builder, i8_pointer, lanes):
    """Bytes as int32, with their sign."""
    raw = builder.load(builder.bitcast(i8_pointer, vector_type(lanes, I8).as_pointer()), align=1)
    return builder.sext(raw, vector_type(lanes, I32))


def _integer(builder, raw, part, bits, lanes):
    """The integers of one row of a line as float32."""

    def shift(vector, by, shifted):
        return shifted(vector, ir.Constant(vector.type, [by] * lanes))

    if bits == 4 and part == 1:
        raw = shift(raw, 4, builder.ashr)
    elif bits == 4 and lanes == 16:
        # AVX-512 looks 16 float32 up by the low four bits of the index, in one instruction. Not for both halves: the
        # units that do it widen bytes as well, and would be the bottleneck.
        permute = llvm_function(
            builder.module, "llvm.x86.avx512.permvar.sf.512", vector_type(16), [vector_type(16), raw.type]
        )
        table = ir.Constant(vector_type(16), [float(n) for n in (*range(8), *range(-8, 0))])
        return builder.call(permute, [table, raw])
    elif bits == 4:
        raw = shift(shift(raw, 28, builder.shl), 28, builder.ashr)
    return builder.sitofp(raw, vector_type(lanes))
