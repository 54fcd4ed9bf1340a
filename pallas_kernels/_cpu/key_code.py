"""LLVM code that reads keys by rows: the scores of a vector of keys, and 8 by 8 transposes.

The functions take the ten int64 of every tile: C, ldc, A, lda, B, ldb, depth, and three with a meaning of their own.
"""

from llvmlite import ir

from pallas_kernels._cpu.code import (
    LANES,
    address_of,
    constant,
    load,
    loop,
    multiply_add,
    prefetch,
    shuffle,
    store,
    vector_type,
)
from pallas_kernels._cpu.memory import I64

# Keys in one call of the score tile.
KEYS = max(LANES, 8)


def score_function(module, bf16):
    """C[rows, KEYS] = A[rows, depth] @ B[KEYS, depth]^T; the last three int64 are rows, next and second.

    The first half of the keys starts at B, the other at `second`, as a page may hold no more than half. KEYS rows at
    `next` are prefetched. depth is a multiple of 8.
    """
    builder, args = _new_function(module, f"scores_{bf16}")
    c, ldc, a, lda, b, ldb, depth, rows, ahead, second = args
    slots = [builder.alloca(vector_type(LANES)) for _ in range(LANES)]
    half = KEYS // 2
    keys = [address_of(builder, b if j < half else second, (ldb, j % half)) for j in range(KEYS)]
    with loop(builder, builder.mul(ldb, ir.Constant(I64, KEYS)), 64) as offset:
        prefetch(builder, address_of(builder, ahead, offset))
    with loop(builder, rows, 1) as row:
        query = address_of(builder, a, (lda, row))
        for group in range(0, KEYS, LANES):
            sums = _dot(builder, slots, query, keys[group : group + LANES], depth, bf16)
            store(builder, _sum_lanes(builder, sums), address_of(builder, c, (ldc, row), 4 * group))
    builder.ret_void()
    return builder.function


def _dot(builder, slots, query, keys, depth, bf16):
    """One vector of partial products for each of LANES keys; `slots` are stack places that become registers."""
    for slot in slots:
        builder.store(constant(0.0), slot)
    shift = ir.Constant(I64, LANES.bit_length() - 1)
    whole = builder.shl(builder.lshr(depth, shift), shift)

    def add(at, lanes):
        q = _read(builder, query, at, lanes, bf16=False)
        for key, slot in zip(keys, slots, strict=True):
            k = _read(builder, key, at, lanes, bf16)
            builder.store(multiply_add(builder, q, k, builder.load(slot)), slot)

    with (
        builder.if_then(builder.icmp_signed(">", whole, ir.Constant(I64, 0))),
        loop(builder, whole, LANES) as at,
    ):
        add(at, LANES)
    if LANES == 16:
        # A head dimension that is an odd multiple of 8 leaves half a vector.
        with builder.if_then(builder.icmp_signed("<", whole, depth)):
            add(whole, 8)
    return [builder.load(slot) for slot in slots]


def _read(builder, i8_pointer, at, lanes, bf16):
    """Elements at .. at + lanes of a row, filled up to a whole vector with zeros."""
    offset = builder.mul(at, ir.Constant(I64, 2 if bf16 else 4))
    value = load(builder, builder.gep(i8_pointer, [offset]), lanes, bf16)
    if lanes == LANES:
        return value
    return shuffle(builder, value, constant(0.0, lanes), list(range(lanes)) + [lanes] * (LANES - lanes))


def _sum_lanes(builder, vectors):
    """Vector of the sums over lanes of each of LANES vectors, by a tree of pairwise sums."""
    even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
    while len(vectors) > 1:
        vectors = [
            builder.fadd(shuffle(builder, x, y, even), shuffle(builder, x, y, odd))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def transpose_function(module, bf16):
    """C[depth, 8] = B[8, depth]^T as float32; depth a multiple of 8."""
    builder, (c, ldc, _, _, b, ldb, depth, *_) = _new_function(module, f"transpose_{bf16}")
    with loop(builder, depth, 8) as at:
        shift = (at, 2 if bf16 else 4)
        rows = [load(builder, address_of(builder, b, (ldb, j), shift), 8, bf16) for j in range(8)]
        for _ in range(3):
            # Row i zipped with row i + 4; three rounds of it are a transpose.
            low = [lane for i in range(4) for lane in (i, 8 + i)]
            high = [lane for i in range(4, 8) for lane in (i, 8 + i)]
            rows = [shuffle(builder, rows[i], rows[i + 4], lanes) for i in range(4) for lanes in (low, high)]
        for j, row in enumerate(rows):
            store(builder, row, address_of(builder, c, (ldc, builder.add(at, ir.Constant(I64, j)))))
    builder.ret_void()
    return builder.function


def widen_function(module, bf16):
    """C[depth] = B[depth] as float32; depth a multiple of 16."""
    builder, (c, _, _, _, b, _, depth, *_) = _new_function(module, f"widen_{bf16}")
    with loop(builder, depth, 16) as at:
        for part in range(0, 16, LANES):
            place = builder.add(at, ir.Constant(I64, part))
            value = load(builder, address_of(builder, b, (place, 2 if bf16 else 4)), LANES, bf16)
            store(builder, value, address_of(builder, c, (place, 4)))
    builder.ret_void()
    return builder.function


def _new_function(module, name):
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 10), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    return ir.IRBuilder(function.append_basic_block()), function.args
