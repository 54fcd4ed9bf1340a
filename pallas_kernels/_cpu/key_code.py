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
    splat,
    store,
    vector_type,
)
from pallas_kernels._cpu.memory import F32, I8, I32, I64

# Keys in one call of the score tile.
KEYS = max(LANES, 8)
# Head dimensions with code of their own.
COMMON_DEPTHS = (64, 128)


def score_function(module, bf16):
    """C[rows, KEYS] = A[rows, depth] @ B[KEYS, depth]^T; the last three int64 are rows, next and second.

    The first half of the keys starts at B, the other at `second`, as a page may hold no more than half. KEYS rows at
    `next` are prefetched. depth is a multiple of 8, the rows of B follow each other without a gap.
    """
    builder, args = _new_function(module, f"scores_{bf16}")
    depth = args[6]
    known = [_known_scores(module, bf16, depth) for depth in COMMON_DEPTHS]
    anything = _any_scores(module, bf16)
    switch = builder.switch(depth, builder.append_basic_block("other"))
    for function, constant_depth in zip(known, COMMON_DEPTHS, strict=True):
        block = builder.append_basic_block("common")
        switch.add_case(ir.Constant(I64, constant_depth), block)
        with builder.goto_block(block):
            builder.call(function, args, tail=True)
            builder.ret_void()
    builder.position_at_end(switch.default)
    builder.call(anything, args, tail=True)
    builder.ret_void()
    return builder.function


def _any_scores(module, bf16):
    """The same for any depth."""
    builder, (c, ldc, a, lda, b, ldb, depth, rows, ahead, second) = _new_function(
        module, f"scores_{bf16}_any"
    )
    keys = _key_addresses(builder, b, second, ldb)
    with loop(builder, builder.mul(ldb, ir.Constant(I64, KEYS)), 64) as offset:
        prefetch(builder, address_of(builder, ahead, offset))
    with loop(builder, rows, 1) as row:
        query = address_of(builder, a, (lda, row))
        for group in range(0, KEYS, LANES):
            sums = _dot(builder, query, keys[group : group + LANES], depth, bf16)
            store(builder, _sum_lanes(builder, sums), address_of(builder, c, (ldc, row), 4 * group))
    builder.ret_void()
    return builder.function


def _known_scores(module, bf16, depth):
    """The same for a depth known here: 16 keys need no 16 pointers, and the loop over the depth unrolls.

    The first two rows ask for half of the lines each, between their multiplications: requests all at once would keep
    the loads that follow waiting until memory has answered.
    """
    builder, (c, ldc, a, lda, b, _, _, rows, ahead, second) = _new_function(module, f"scores_{bf16}_{depth}")
    key_bytes = depth * (2 if bf16 else 4)
    keys = _key_addresses(builder, b, second, ir.Constant(I64, key_bytes))
    half_lines = KEYS * key_bytes // 2 // 64

    def one_row(row, requests):
        query = address_of(builder, a, (lda, row))
        for group in range(0, KEYS, LANES):
            asked = requests[group * len(requests) // KEYS : (group + LANES) * len(requests) // KEYS]
            sums = _known_dot(builder, query, keys[group : group + LANES], depth, bf16, asked)
            store(builder, _sum_lanes(builder, sums), address_of(builder, c, (ldc, row), 4 * group))

    two = ir.Constant(I64, 2)
    several = builder.icmp_signed(">=", rows, two)
    with builder.if_then(builder.not_(several)):
        for line in range(half_lines, 2 * half_lines):
            prefetch(builder, address_of(builder, ahead, 64 * line))
    with loop(builder, builder.select(several, two, rows), 1) as row:
        one_row(row, [address_of(builder, ahead, (row, 64 * half_lines), 64 * i) for i in range(half_lines)])
    with (
        builder.if_then(builder.icmp_signed(">", rows, two)),
        loop(builder, builder.sub(rows, two), 1) as row,
    ):
        one_row(builder.add(row, two), [])
    builder.ret_void()
    return builder.function


def _key_addresses(builder, first, second, key_bytes):
    half = KEYS // 2
    return [address_of(builder, first if j < half else second, (key_bytes, j % half)) for j in range(KEYS)]


def _dot(builder, query, keys, depth, bf16):
    """One vector of partial products for each of LANES keys."""
    with builder.goto_entry_block():
        slots = [builder.alloca(vector_type(LANES)) for _ in keys]
    for slot in slots:
        builder.store(constant(0.0), slot)

    def add(at, lanes):
        q = _read(builder, query, at, lanes, bf16=False)
        for key, slot in zip(keys, slots, strict=True):
            k = _read(builder, key, at, lanes, bf16)
            builder.store(multiply_add(builder, q, k, builder.load(slot)), slot)

    shift = ir.Constant(I64, LANES.bit_length() - 1)
    whole = builder.shl(builder.lshr(depth, shift), shift)
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


def _known_dot(builder, query, keys, depth, bf16, requests):
    """The same for a depth known here, key by key, so that memory is read in order, and requests in between.

    bfloat16 come in pairs of an even and an odd one, which part by a shift and a mask, cheaper than widening.
    """
    queries = [
        _read(builder, query, ir.Constant(I64, at), LANES, bf16=False) for at in range(0, depth, LANES)
    ]
    if bf16:
        pairs = zip(queries[::2], queries[1::2], strict=True)
        queries = [
            shuffle(builder, *pair, list(range(parity, 2 * LANES, 2))) for pair in pairs for parity in (0, 1)
        ]
    sums = []
    for j, key in enumerate(keys):
        for request in requests[j * len(requests) // len(keys) : (j + 1) * len(requests) // len(keys)]:
            prefetch(builder, request)
        total = constant(0.0)
        for i, q in enumerate(queries):
            total = multiply_add(
                builder, q, _pair_part(builder, key, i) if bf16 else _part(builder, key, i), total
            )
        sums.append(total)
    return sums


def _part(builder, key, i):
    return load(builder, builder.gep(key, [ir.Constant(I64, 4 * LANES * i)]), LANES)


def _pair_part(builder, key, i):
    """Even (i even) or odd elements of the 2 LANES bfloat16 that hold part i."""
    integers = vector_type(LANES, I32)
    place = builder.gep(key, [ir.Constant(I64, 4 * LANES * (i // 2))])
    raw = builder.load(builder.bitcast(place, integers.as_pointer()), align=2)
    if i % 2 == 0:
        bits = builder.shl(raw, ir.Constant(integers, [16] * LANES))
    else:
        bits = builder.and_(raw, ir.Constant(integers, [0xFFFF0000] * LANES))
    return builder.bitcast(bits, vector_type(LANES))


def _read(builder, i8_pointer, at, lanes, bf16):
    """Elements at .. at + lanes of a row, filled up to a whole vector with zeros."""
    offset = builder.mul(at, ir.Constant(I64, 2 if bf16 else 4))
    value = load(builder, builder.gep(i8_pointer, [offset]), lanes, bf16)
    if lanes == LANES:
        return value
    return shuffle(builder, value, constant(0.0, lanes), list(range(lanes)) + [lanes] * (LANES - lanes))


def _sum_lanes(builder, vectors):
    """Vector of the sums over lanes of each of LANES vectors, by a tree of pairwise sums.

    First single lanes within each 128 bits, then these quarters: x86 shuffles both in one cheap instruction.
    """
    for width in (1, 4):
        while len(vectors) > (LANES // 4 if width == 1 else 1):
            sides = [_every_other(parity, width) for parity in (0, 1)]
            vectors = [
                builder.fadd(*(shuffle(builder, x, y, side) for side in sides))
                for x, y in zip(vectors[::2], vectors[1::2], strict=True)
            ]
    return vectors[0]


def _every_other(parity, width):
    """Lanes that take the even (or odd) runs of `width` of two vectors."""
    if width == 4:
        runs = range(parity, LANES // 2, 2)
        return [4 * run + i for run in runs for i in range(4)]
    lanes = range(0, LANES, 4)
    return [side + lane + i for lane in lanes for side in (0, LANES) for i in (parity, parity + 2)]


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


def unpack_function(module, bits):
    """C[rows, depth] = low + step * code of rows of codes of `bits`; A holds a word of step and low for each row, lda is rows.

    A row of 4 bits holds the first half of the depth in its low nibbles, the second in the high ones.
    """
    builder, (c, ldc, words, rows, codes, row_bytes, depth, _, ahead, _) = _new_function(
        module, f"unpack_{bits}"
    )
    step_size = min(LANES, 16)
    integers = vector_type(step_size, I32)
    half = builder.mul(depth, ir.Constant(I64, 2))  # bytes of half a row of C
    half_row = builder.lshr(row_bytes, ir.Constant(I64, 1))
    with loop(builder, rows, 1) as row:
        for part in range(2):
            prefetch(builder, address_of(builder, ahead, (row_bytes, row), (half_row, part)))
        word = builder.load(builder.bitcast(address_of(builder, words, (row, 4)), I32.as_pointer()), align=4)
        low = splat(builder, builder.bitcast(builder.shl(word, ir.Constant(I32, 16)), F32), step_size)
        step = splat(
            builder, builder.bitcast(builder.and_(word, ir.Constant(I32, 0xFFFF0000)), F32), step_size
        )

        def write(code, *where, step=step, low=low, row=row):
            value = multiply_add(builder, builder.sitofp(code, vector_type(step_size)), step, low)
            store(builder, value, address_of(builder, c, (ldc, row), *where))

        with loop(builder, row_bytes, step_size) as at:
            source = address_of(builder, codes, (row_bytes, row), at)
            raw = builder.load(builder.bitcast(source, vector_type(step_size, I8).as_pointer()), align=1)
            code = builder.zext(raw, integers)
            if bits == 8:
                write(code, (at, 4))
            else:
                write(builder.and_(code, ir.Constant(integers, [15] * step_size)), (at, 4))
                write(builder.lshr(code, ir.Constant(integers, [4] * step_size)), (at, 4), half)
    builder.ret_void()
    return builder.function


def _new_function(module, name):
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 10), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    return ir.IRBuilder(function.append_basic_block()), function.args
