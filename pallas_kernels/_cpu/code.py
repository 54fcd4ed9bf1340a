"""Pieces of LLVM code that the kernels are written with, and the width of the machine's vectors."""

import contextlib

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import codegen, config

from pallas_kernels._cpu.memory import F32, I8, I16, I32, I64


def _lanes() -> int:
    """float32 in a vector of the machine that numba compiles for."""
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
    if "+avx512f" in features:
        return 16
    return 8 if "+avx2" in features else 4


LANES = _lanes()
# Vector registers: AVX-512 and NEON have 32, AVX2 and SSE 16.
REGISTERS = 32 if LANES == 16 or llvm.get_process_triple().startswith(("aarch64", "arm64")) else 16


def vector_type(lanes: int, element=F32) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def constant(value: float, lanes: int = LANES) -> ir.Constant:
    return ir.Constant(vector_type(lanes), [value] * lanes)


def splat(builder, scalar, lanes: int = LANES):
    empty = ir.Constant(vector_type(lanes, scalar.type), ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(vector_type(lanes, I32), [0] * lanes))


def shuffle(builder, a, b, lanes_of_result: list[int]):
    return builder.shuffle_vector(a, b, ir.Constant(vector_type(len(lanes_of_result), I32), lanes_of_result))


def load(builder, i8_pointer, lanes: int, bf16: bool = False):
    """`lanes` float32, or bfloat16 widened to float32."""
    if not bf16:
        return builder.load(builder.bitcast(i8_pointer, vector_type(lanes).as_pointer()), align=4)
    halves = builder.load(builder.bitcast(i8_pointer, vector_type(lanes, I16).as_pointer()), align=2)
    wide = builder.zext(halves, vector_type(lanes, I32))
    shifted = builder.shl(wide, ir.Constant(wide.type, [16] * lanes))
    return builder.bitcast(shifted, vector_type(lanes))


def load_int8(builder, i8_pointer, lanes: int):
    """`lanes` int8 as float32."""
    narrow = builder.load(builder.bitcast(i8_pointer, vector_type(lanes, I8).as_pointer()), align=1)
    return builder.sitofp(builder.sext(narrow, vector_type(lanes, I32)), vector_type(lanes))


def store(builder, value, i8_pointer) -> None:
    builder.store(value, builder.bitcast(i8_pointer, value.type.as_pointer()), align=4)


def llvm_function(module, name: str, result, parameters):
    """A function declared by its full name, once per module."""
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, parameters), name)


def multiply_add(builder, a, b, c):
    """a * b + c, fused where the machine can (llvm.fma would call a library function where it cannot)."""
    function = llvm_function(builder.module, f"llvm.fmuladd.v{a.type.count}f32", a.type, [a.type] * 3)
    return builder.call(function, [a, b, c])


def maximum(builder, a, b):
    """The larger; NaN in a gives b."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def prefetch(builder, i8_pointer) -> None:
    """Asks for a line to read, into the second level: a first level of 32 KiB would lose it again."""
    parameters = [I8.as_pointer(), I32, I32, I32]
    function = llvm_function(builder.module, "llvm.prefetch.p0", ir.VoidType(), parameters)
    builder.call(function, [i8_pointer, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])


def address_of(builder, base, *terms):
    """An i8 pointer to base + sum of terms; each is an int64, or a pair of int64 to be multiplied."""
    for term in terms:
        if isinstance(term, tuple):
            left, right = (ir.Constant(I64, x) if isinstance(x, int) else x for x in term)
            term = builder.mul(left, right)
        base = builder.add(base, ir.Constant(I64, term) if isinstance(term, int) else term)
    return builder.inttoptr(base, I8.as_pointer())


@contextlib.contextmanager
def loop(builder, end, step: int):
    """for i in range(0, end, step), end > 0: the body is what the `with` block builds."""
    before, body = builder.block, builder.append_basic_block("loop")
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), before)
    yield index
    following = builder.add(index, ir.Constant(I64, step))
    index.add_incoming(following, builder.block)
    after = builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed("<", following, end), body, after)
    builder.position_at_end(after)
