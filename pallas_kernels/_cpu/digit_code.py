"""LLVM code for products of float32 activations and weights that are integers with scales.

The activations of a group become integers too, of 24 bits with their sign, the largest of them 127 * 2^16: half a unit is
2^-24 of it, as much as float32 leaves open. An integer is three signed bytes, its digits to base 256, so a group's sums are
of products of bytes and exact in int32: their order does not matter, nor how many rows go together.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pallas_kernels._cpu.bytes import (
    byte_constant,
    byte_vector,
    dot_bytes,
    load_bytes,
    nibbles,
)
from pallas_kernels._cpu.code import (
    LANES,
    REGISTERS,
    address_of,
    constant,
    llvm_function,
    load,
    loop,
    multiply_add,
    prefetch,
    shuffle,
    splat,
    store,
    vector_type,
)
from pallas_kernels._cpu.memory import F32, I32, I64, pointer

DIGITS, LARGEST = 3, 127 * 2**16
HEAD = 16  # bytes before the digits of a group: what the sum of each digit begins with, the scale
INTEGER_ROWS = 6 if REGISTERS == 32 else 3  # of a tile: all sums in registers
COLUMNS = 16  # of a tile
LINE = 4 * COLUMNS  # bytes of weights: four rows of every column, or eight of four bits
AHEAD = 4096  # bytes of weights that are asked for before they are needed


def _variables(builder, count, kind, value=0):
    """Only what is allocated at a function's entry becomes registers."""
    with builder.goto_entry_block():
        places = [builder.alloca(kind) for _ in range(count)]
    for place in places:
        builder.store(ir.Constant(kind, [value] * kind.count), place)
    return places


@intrinsic
def store_digits(typingctx, to, source, count, factor, offset):
    """The digits of `count` float32 times `factor`, four values after another: the lowest of each, the middle, the highest.
    Before them, at `to`, minus `offset` times the sum of each digit. count: a multiple of 16.
    """

    def codegen(context, builder, signature, args):
        to, source, count, factor, offset = args
        wide, narrow, words = vector_type(16, I32), byte_vector(16), vector_type(4, I32)
        rint = llvm_function(builder.module, "llvm.rint.v16f32", vector_type(16), [vector_type(16)])
        totals, factors = _variables(builder, DIGITS, wide), splat(builder, factor, 16)
        with loop(builder, count, 16) as k:
            scaled = builder.fmul(load(builder, address_of(builder, source, (k, 4)), 16), factors)
            left, digits = builder.fptosi(builder.call(rint, [scaled]), wide), []
            for total in totals:
                digit = builder.trunc(left, narrow)
                value = builder.sext(digit, wide)
                left = builder.ashr(builder.sub(left, value), ir.Constant(wide, [8] * 16))
                builder.store(builder.add(builder.load(total), value), total)
                digits.append(builder.bitcast(digit, words))
            low, middle, high = digits
            first, last = (
                shuffle(builder, low, middle, list(range(8))),
                shuffle(builder, high, high, list(range(8))),
            )
            at = address_of(builder, to, (k, DIGITS), HEAD)
            for part, order in enumerate(([0, 4, 8, 1], [5, 9, 2, 6], [10, 3, 7, 11])):
                place = builder.gep(at, [ir.Constant(I64, 16 * part)])
                store(builder, shuffle(builder, first, last, order), place)
        add = llvm_function(builder.module, "llvm.vector.reduce.add.v16i32", I32, [wide])
        offset = builder.neg(builder.trunc(offset, I32))
        for place, total in enumerate(totals):
            value = builder.mul(builder.call(add, [builder.load(total)]), offset)
            at = builder.add(to, ir.Constant(I64, 4 * place))
            builder.store(value, pointer(builder, at, I32), align=4)
        return context.get_dummy_value()

    parameters = (types.int64, types.int64, types.int64, types.float32, types.int64)
    return types.void(*parameters), codegen


def integer_tile_function(module, rows, bits):
    """void(C, ldc, A, lda, B, -, depth, group, -, -), strides in bytes; depth > 0.

    C[rows, 16] = A[rows, depth] @ B[depth, 16], float32. A is digits, those of column k's group 4 * k bytes from a row's
    beginning, where the floats would be. B lies group by group: lines, each of four rows of B (or eight, the last four
    in the high halves of bytes), four bytes for each column; then the 16 scales.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 10), f"integers_{rows}_{bits}")
    function.linkage = "internal"
    function.attributes.add("noinline")
    c, ldc, a, lda, b, _, depth, group, _, _ = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    lanes = min(LANES, COLUMNS)
    for first in range(0, COLUMNS, lanes):
        _columns(builder, rows, bits, first, lanes, (c, ldc, a, lda, b, depth, group))
    builder.ret_void()
    return function


def _columns(builder, rows, bits, first, lanes, given):
    """`lanes` columns of the tile, from `first` on."""
    c, ldc, a, lda, b, depth, group = given
    depth_of_line = 32 // bits
    wide, floats = vector_type(lanes, I32), vector_type(lanes)
    totals = _variables(builder, rows, floats, 0.0)
    # A few rows keep both halves of a line apart: a sum takes longer than the line does.
    apart = depth_of_line // 4 if rows < 3 else 1
    sums = {(row, digit): _variables(builder, apart, wide) for row in range(rows) for digit in range(DIGITS)}
    per_line = ir.Constant(I64, depth_of_line)
    whole = builder.add(
        builder.mul(builder.sdiv(group, per_line), ir.Constant(I64, LINE)), ir.Constant(I64, LINE)
    )
    groups = builder.sdiv(builder.sub(builder.add(depth, group), ir.Constant(I64, 1)), group)
    with loop(builder, groups, 1) as g:
        begin = builder.mul(g, group)
        left = builder.sub(depth, begin)
        count = builder.select(builder.icmp_signed("<", left, group), left, group)
        lines = builder.sdiv(count, per_line)
        weights, digits = (
            builder.add(b, builder.mul(g, whole)),
            builder.add(a, builder.mul(begin, ir.Constant(I64, 4))),
        )
        for (row, digit), parts in sums.items():
            head = address_of(builder, digits, (lda, row), 4 * digit)
            value = builder.load(builder.bitcast(head, I32.as_pointer()), align=4)
            builder.store(splat(builder, value, lanes), parts[0])
            for part in parts[1:]:
                builder.store(ir.Constant(wide, [0] * lanes), part)
        with loop(builder, lines, 1) as line:
            raw = load_bytes(builder, address_of(builder, weights, (line, LINE), 4 * first), 4 * lanes)
            if first == 0:
                prefetch(builder, address_of(builder, weights, (line, LINE), AHEAD))
            if bits == 4:
                codes = nibbles(builder, raw)
            else:
                codes = (builder.xor(raw, byte_constant(0x80, 4 * lanes)),)
            for half, unsigned in enumerate(codes):
                for (row, digit), parts in sums.items():
                    part, within = parts[half % apart], HEAD + 4 * (DIGITS * half + digit)
                    at = address_of(builder, digits, (lda, row), (line, DIGITS * depth_of_line), within)
                    four = builder.load(builder.bitcast(at, I32.as_pointer()), align=4)
                    signed = builder.bitcast(splat(builder, four, lanes), byte_vector(4 * lanes))
                    builder.store(dot_bytes(builder, builder.load(part), unsigned, signed, bits), part)
        prefetch(builder, address_of(builder, weights, (lines, LINE), AHEAD))
        scales = load(builder, address_of(builder, weights, (lines, LINE), 4 * first), lanes)
        for row in range(rows):
            low, middle, high = (_added(builder, sums[row, digit]) for digit in range(DIGITS))
            lower = builder.add(builder.shl(middle, ir.Constant(wide, [8] * lanes)), low)
            upper, lower = builder.sitofp(high, floats), builder.sitofp(lower, floats)
            value = multiply_add(builder, upper, constant(65536.0, lanes), lower)
            at = builder.bitcast(address_of(builder, digits, (lda, row), 4 * DIGITS), F32.as_pointer())
            factor = splat(builder, builder.load(at, align=4), lanes)
            total = multiply_add(builder, builder.fmul(value, factor), scales, builder.load(totals[row]))
            builder.store(total, totals[row])
    for row, total in enumerate(totals):
        store(builder, builder.load(total), address_of(builder, c, (ldc, row), 4 * first))


def _added(builder, parts):
    total = builder.load(parts[0])
    for part in parts[1:]:
        total = builder.add(total, builder.load(part))
    return total
