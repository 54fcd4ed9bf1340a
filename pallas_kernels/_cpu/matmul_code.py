"""LLVM code of one register tile of a matmul: a few rows by a few vectors, all accumulators in registers (BLIS)."""

from llvmlite import ir

from pallas_kernels._cpu.code import (
    LANES,
    REGISTERS,
    address_of,
    load,
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
# Rows of B that the prefetch runs ahead: about 400 cycles of a full tile.
AHEAD = 32

# What a tile does besides multiplying: nothing; ask memory for later rows of B; that and copy B (as float32) aside.
PLAIN, STREAM, PACK = 0, 1, 2


def tile_function(module, rows, width, bf16, kind):
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
    c_rows = [address_of(builder, c, (ldc, i)) for i in range(rows)]
    a_rows = [address_of(builder, a, (lda, i)) for i in range(rows)]
    b_start, pack_start = address_of(builder, b), address_of(builder, pack)
    next_start = address_of(builder, next_b)
    ahead = address_of(builder, b, (ldb, AHEAD))
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
            prefetch(builder, builder.gep(ahead_at, [ir.Constant(I64, offset)]))
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
