"""Loads, stores and a little libc for numba code that works on addresses (int64)."""

import sys

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

if sys.platform == "win32":
    raise NotImplementedError("the CPU kernels need a POSIX C library")

# error_model: a raised exception would need the GIL. No boundscheck or NRT is involved, all is addresses.
OPTIONS = {"error_model": "numpy", "boundscheck": False, "nogil": True}
jit = numba.njit(**OPTIONS)

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def pointer(builder, address, ir_type):
    return builder.inttoptr(address, ir_type.as_pointer())


@intrinsic
def load_i32(typingctx, address):
    """int32 at address, as int64."""

    def codegen(context, builder, signature, args):
        return builder.sext(builder.load(pointer(builder, args[0], I32), align=4), I64)

    return types.int64(types.int64), codegen


@intrinsic
def store_i32(typingctx, address, value):
    def codegen(context, builder, signature, args):
        builder.store(builder.trunc(args[1], I32), pointer(builder, args[0], I32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load_i64(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.load(pointer(builder, args[0], I64), align=8)

    return types.int64(types.int64), codegen


@intrinsic
def store_i64(typingctx, address, value):
    def codegen(context, builder, signature, args):
        builder.store(args[1], pointer(builder, args[0], I64), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load_f32(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.load(pointer(builder, args[0], F32), align=4)

    return types.float32(types.int64), codegen


@intrinsic
def store_f32(typingctx, address, value):
    def codegen(context, builder, signature, args):
        builder.store(args[1], pointer(builder, args[0], F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def float_bits(typingctx, value):
    """The 32 bits of a float32, as int64."""

    def codegen(context, builder, signature, args):
        return builder.sext(builder.bitcast(args[0], I32), I64)

    return types.int64(types.float32), codegen


@intrinsic
def float_of_bits(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], I32), F32)

    return types.float32(types.int64), codegen


def _libc(name, result, *parameters):
    """An intrinsic that calls a function of the C library; all values are int64 (void: None)."""

    def call(context, builder, args):
        declared = ir.FunctionType(I64 if result else ir.VoidType(), [I64] * len(parameters))
        function = builder.module.globals.get(name) or ir.Function(builder.module, declared, name)
        value = builder.call(function, args)
        return value if result else context.get_dummy_value()

    return call


@intrinsic
def malloc(typingctx, size):
    call = _libc("malloc", True, "size")
    return types.int64(types.int64), lambda context, builder, signature, args: call(context, builder, args)


@intrinsic
def free(typingctx, address):
    call = _libc("free", False, "address")
    return types.void(types.int64), lambda context, builder, signature, args: call(context, builder, args)


@intrinsic
def yield_thread(typingctx):
    call = _libc("sched_yield", False)
    return types.void(), lambda context, builder, signature, args: call(context, builder, args)


@intrinsic
def copy_bytes(typingctx, to, source, size):
    """memcpy"""

    def codegen(context, builder, signature, args):
        to, source = (builder.inttoptr(a, I8.as_pointer()) for a in args[:2])
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [I8.as_pointer(), I8.as_pointer(), I64])
        builder.call(memcpy, [to, source, args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def zero_bytes(typingctx, to, size):
    """memset to 0"""

    def codegen(context, builder, signature, args):
        memset = builder.module.declare_intrinsic("llvm.memset", [I8.as_pointer(), I64])
        to = builder.inttoptr(args[0], I8.as_pointer())
        builder.call(memset, [to, ir.Constant(I8, 0), args[1], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
