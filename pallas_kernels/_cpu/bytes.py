"""LLVM code for dot products of 8-bit integers: four neighbours of unsigned times signed, added to an int32 lane."""

from llvmlite import ir
from numba.core import codegen, config

from pallas_kernels._cpu.code import llvm_function, shuffle, vector_type
from pallas_kernels._cpu.memory import I8, I16, I32


def _has_vnni() -> bool:
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
    return {"+avx512vnni", "+avx512vl"} <= set(features.split(","))


VNNI = _has_vnni()


def byte_vector(count: int) -> ir.VectorType:
    return vector_type(count, I8)


def load_bytes(builder, i8_pointer, count: int):
    return builder.load(builder.bitcast(i8_pointer, byte_vector(count).as_pointer()), align=1)


def byte_constant(value: int, count: int) -> ir.Constant:
    return ir.Constant(byte_vector(count), [value] * count)


def dot_bytes(builder, total, unsigned, signed):
    """total + the dot products of fours; lanes of `total` a quarter of the bytes. Only the sum of all lanes is the same
    on every machine."""
    count = unsigned.type.count
    lanes = vector_type(count // 4, I32)
    if VNNI:
        name = f"llvm.x86.avx512.vpdpbusd.{8 * count}"
        function = llvm_function(builder.module, name, lanes, [lanes] * 3)
        return builder.call(function, [total, *(builder.bitcast(v, lanes) for v in (unsigned, signed))])
    wide = vector_type(count, I16)
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    for begin in range(0, count, count // 4):
        part = shuffle(builder, products, products, list(range(begin, begin + count // 4)))
        total = builder.add(total, builder.sext(part, lanes))
    return total


def nibbles(builder, packed):
    """Both halves of the bytes of `int4_matmul.matrix.pack`, as unsigned integers from 0 to 15: code plus 8."""
    count = packed.type.count
    flipped = builder.xor(packed, byte_constant(0x80, count))
    low = builder.and_(flipped, byte_constant(15, count))
    halves = vector_type(count // 2, I16)
    shifted = builder.lshr(builder.bitcast(flipped, halves), ir.Constant(halves, [4] * (count // 2)))
    return low, builder.and_(builder.bitcast(shifted, packed.type), byte_constant(15, count))
