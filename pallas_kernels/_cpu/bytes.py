"""LLVM code for dot products of 8-bit integers: four neighbours of unsigned times signed, added to an int32 lane."""

from llvmlite import ir
from numba.core import codegen, config

from pallas_kernels._cpu.code import llvm_function, shuffle, vector_type
from pallas_kernels._cpu.memory import I8, I16, I32


def _features() -> set[str]:
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
    return set(features.split(","))


VNNI = {"+avx512vnni", "+avx512vl"} <= _features()
# By bytes of a vector: unsigned times signed bytes, neighbours added as int16 (which saturates); neighbours of those, as int32.
_PAIRS = {
    16: ("+ssse3", "llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
    32: ("+avx2", "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    64: ("+avx512bw", "llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
}


def byte_vector(count: int) -> ir.VectorType:
    return vector_type(count, I8)


def load_bytes(builder, i8_pointer, count: int):
    return builder.load(builder.bitcast(i8_pointer, byte_vector(count).as_pointer()), align=1)


def byte_constant(value: int, count: int) -> ir.Constant:
    return ir.Constant(byte_vector(count), [value] * count)


def dot_bytes(builder, total, unsigned, signed, bits: int = 8):
    """total + the dot products of fours of neighbours; lanes of `total` a quarter of the bytes.

    bits: of an unsigned byte that may be set, 8 or 4.
    """
    count = unsigned.type.count
    lanes = vector_type(count // 4, I32)
    if VNNI:
        name = f"llvm.x86.avx512.vpdpbusd.{8 * count}"
        function = llvm_function(builder.module, name, lanes, [lanes] * 3)
        return builder.call(function, [total, *(builder.bitcast(v, lanes) for v in (unsigned, signed))])
    has = _features()
    if count in _PAIRS and _PAIRS[count][0] in has:
        return _dot_pairs(builder, total, unsigned, signed, bits)
    if count > 16 and _PAIRS[16][0] in has:
        halves = [
            dot_bytes(builder, *(_half(builder, v, part) for v in (total, unsigned, signed)), bits)
            for part in (0, 1)
        ]
        return shuffle(builder, *halves, list(range(count // 4)))
    wide = vector_type(count, I16)
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    for place in range(4):
        part = shuffle(builder, products, products, list(range(place, count, 4)))
        total = builder.add(total, builder.sext(part, lanes))
    return total


def _half(builder, value, which: int):
    half = value.type.count // 2
    return shuffle(builder, value, value, list(range(which * half, (which + 1) * half)))


def _dot_pairs(builder, total, unsigned, signed, bits: int):
    """Four bits at a time, so that no sum of two products leaves an int16."""
    count, lanes = unsigned.type.count, total.type
    halves = vector_type(count // 2, I16)
    _, of_bytes, of_halves = _PAIRS[count]
    multiply = llvm_function(builder.module, of_bytes, halves, [unsigned.type] * 2)
    add = llvm_function(builder.module, of_halves, lanes, [halves] * 2)
    for part, factor in zip((unsigned,) if bits == 4 else split_bytes(builder, unsigned), (1, 16)):
        pairs = builder.call(multiply, [part, signed])
        factors = ir.Constant(halves, [factor] * (count // 2))
        total = builder.add(total, builder.call(add, [pairs, factors]))
    return total


def split_bytes(builder, unsigned):
    """The low and the high four bits of every byte."""
    count = unsigned.type.count
    halves = vector_type(count // 2, I16)
    shifted = builder.lshr(builder.bitcast(unsigned, halves), ir.Constant(halves, [4] * (count // 2)))
    low, high = unsigned, builder.bitcast(shifted, unsigned.type)
    return tuple(builder.and_(part, byte_constant(15, count)) for part in (low, high))


def nibbles(builder, packed):
    """Both halves of the bytes of `int4_matmul.matrix.pack`, as unsigned integers from 0 to 15: code plus 8."""
    return split_bytes(builder, builder.xor(packed, byte_constant(0x80, packed.type.count)))
