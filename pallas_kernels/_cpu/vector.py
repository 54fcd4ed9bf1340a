"""A float32 vector of the machine's width as a numba type, with the operations that the kernels use."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from pallas_kernels._cpu.code import (
    LANES,
    constant,
    load,
    load_int8,
    maximum,
    multiply_add,
    prefetch,
    shuffle,
    splat,
    store,
    vector_type,
)
from pallas_kernels._cpu.memory import I8, I16, I32, jit, pointer


class VectorType(types.Type):
    def __init__(self):
        super().__init__(name=f"float32x{LANES}")


float32v = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, vector_type(LANES))


@intrinsic
def vload(typingctx, address):
    def codegen(context, builder, signature, args):
        return load(builder, pointer(builder, args[0], I8), LANES)

    return float32v(types.int64), codegen


@intrinsic
def vstore(typingctx, address, value):
    def codegen(context, builder, signature, args):
        store(builder, args[1], pointer(builder, args[0], I8))
        return context.get_dummy_value()

    return types.void(types.int64, float32v), codegen


@intrinsic
def vload_as(typingctx, tag, address):
    """Elements of the type that tag stands for (`tiles.FLOAT32`, `BFLOAT16`, `INT8`), widened to float32."""

    def codegen(context, builder, signature, args):
        at = pointer(builder, args[1], I8)
        if tag == types.int8:
            return load_int8(builder, at, LANES)
        return load(builder, at, LANES, bf16=tag == types.uint16)

    return float32v(tag, types.int64), codegen


@intrinsic
def vstore_as(typingctx, tag, address, value):
    """Stores values that the type of tag holds exactly; the low half of a bfloat16 is dropped."""

    def codegen(context, builder, signature, args):
        value, wide, align = args[2], vector_type(LANES, I32), 4
        if tag == types.uint16:
            bits = builder.lshr(builder.bitcast(value, wide), ir.Constant(wide, [16] * LANES))
            value, align = builder.trunc(bits, vector_type(LANES, I16)), 2
        elif tag == types.int8:
            value, align = builder.trunc(builder.fptosi(value, wide), vector_type(LANES, I8)), 1
        to = builder.bitcast(pointer(builder, args[1], I8), value.type.as_pointer())
        builder.store(value, to, align=align)
        return context.get_dummy_value()

    return types.void(tag, types.int64, float32v), codegen


@intrinsic
def prefetch_line(typingctx, address):
    def codegen(context, builder, signature, args):
        prefetch(builder, pointer(builder, args[0], I8))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def vsplat(typingctx, scalar):
    def codegen(context, builder, signature, args):
        return splat(builder, args[0])

    return float32v(types.float32), codegen


@intrinsic
def vmuladd(typingctx, a, b, c):
    """a * b + c"""

    def codegen(context, builder, signature, args):
        return multiply_add(builder, *args)

    return float32v(float32v, float32v, float32v), codegen


@intrinsic
def vmax(typingctx, a, b):
    def codegen(context, builder, signature, args):
        return maximum(builder, *args)

    return float32v(float32v, float32v), codegen


@intrinsic
def vmin(typingctx, a, b):
    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return float32v(float32v, float32v), codegen


@intrinsic
def vfloor(typingctx, x):
    """The largest whole number no larger, of numbers within an int32."""

    def codegen(context, builder, signature, args):
        cut = builder.sitofp(builder.fptosi(args[0], vector_type(LANES, I32)), vector_type(LANES))
        return builder.select(builder.fcmp_ordered(">", cut, args[0]), builder.fsub(cut, constant(1.0)), cut)

    return float32v(float32v), codegen


@intrinsic
def vadd(typingctx, a, b):
    return float32v(float32v, float32v), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def vsub(typingctx, a, b):
    return float32v(float32v, float32v), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def vmul(typingctx, a, b):
    return float32v(float32v, float32v), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def vdiv(typingctx, a, b):
    return float32v(float32v, float32v), lambda context, builder, signature, args: builder.fdiv(*args)


def _fold(builder, value, combine):
    """Combines all lanes by halves: the same order for every call."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low = shuffle(builder, value, value, list(range(lanes)))
        value = combine(builder, low, shuffle(builder, value, value, list(range(lanes, 2 * lanes))))
    return builder.extract_element(value, ir.Constant(I32, 0))


@intrinsic
def vfirst(typingctx, value):
    """Lane 0"""

    def codegen(context, builder, signature, args):
        return builder.extract_element(args[0], ir.Constant(I32, 0))

    return types.float32(float32v), codegen


@intrinsic
def vreduce_add(typingctx, value):
    def codegen(context, builder, signature, args):
        return _fold(builder, args[0], lambda b, x, y: b.fadd(x, y))

    return types.float32(float32v), codegen


@intrinsic
def vreduce_max(typingctx, value):
    def codegen(context, builder, signature, args):
        return _fold(builder, args[0], maximum)

    return types.float32(float32v), codegen


@intrinsic
def vkeep(typingctx, value, low, high):
    """Lanes i with low <= i < high of value, minus infinity elsewhere."""

    def codegen(context, builder, signature, args):
        value, low, high = args
        lane = ir.Constant(vector_type(LANES, I32), list(range(LANES)))
        low, high = (splat(builder, builder.trunc(x, I32)) for x in (low, high))
        inside = builder.and_(builder.icmp_signed(">=", lane, low), builder.icmp_signed("<", lane, high))
        return builder.select(inside, value, constant(float("-inf")))

    return float32v(float32v, types.int64, types.int64), codegen


@intrinsic
def vexp(typingctx, x):
    """exp to about 1e-7 relative: 2^n * p(r), the polynomial of Cephes' expf. Below -87, zero; above 88, exp(88)."""

    def codegen(context, builder, signature, args):
        x = args[0]
        vanishes = builder.fcmp_unordered("<", x, constant(-87.0))
        x = builder.select(builder.fcmp_ordered("<", x, constant(88.0)), x, constant(88.0))
        # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
        magic = constant(12582912.0)
        shifted = builder.fadd(builder.fmul(x, constant(1.4426950408889634)), magic)
        n = builder.fsub(shifted, magic)
        # ln 2 in two parts (Cody and Waite), the first exact in few bits.
        r = multiply_add(builder, n, constant(-0.693359375), x)
        r = multiply_add(builder, n, constant(2.12194440e-4), r)
        p = constant(1.9875691500e-4)
        for coefficient in (
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ):
            p = multiply_add(builder, p, r, constant(coefficient))
        p = multiply_add(builder, p, builder.fmul(r, r), builder.fadd(r, constant(1.0)))
        integers = vector_type(LANES, I32)
        exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [23] * LANES))
        scaled = builder.bitcast(builder.add(builder.bitcast(p, integers), exponent), vector_type(LANES))
        return builder.select(vanishes, constant(0.0), scaled)

    return float32v(float32v), codegen


@jit
def vsigmoid(x):
    one = vsplat(1.0)
    return vdiv(one, vadd(one, vexp(vsub(vsplat(0.0), x))))
