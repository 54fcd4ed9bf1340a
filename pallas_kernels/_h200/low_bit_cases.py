"""The kernels of low bits: int4_matmul in every mode, quantize with what comes before it."""

from collections.abc import Callable

import jax

from pallas_kernels._h200.case import Array, Case
from pallas_kernels.int4_matmul import PackedMatrix
from pallas_kernels.int4_matmul import mosaic_gpu as low_bits
from pallas_kernels.int4_matmul.shapes import ON_GPU as LOW_BIT_SHAPES
from pallas_kernels.quantize import Gated, Normed, QuantizedRows
from pallas_kernels.quantize import mosaic_gpu as rounding
from pallas_kernels.quantize.shapes import ON_GPU as ROUNDING_SHAPES


def product(shape, two_level: bool) -> tuple[tuple[Array, ...], Callable]:
    """Arguments for int4_matmul of 8-bit activations, flat, and what makes its x and w of them."""
    lead = (shape.experts,) if shape.experts else ()
    low, n, m = shape.inputs - shape.outliers, shape.outputs, shape.rows
    groups = low // shape.group
    two = [((*lead, n, groups), "uint8"), ((*lead, n), "float32")]
    scales: list[Array] = two if two_level else [((*lead, n // 2, groups), "float32")]
    weights = (
        ((*lead, n, low // 2), "uint8"),
        *scales,
        ((*lead, n, shape.outliers), "int8"),
        ((*lead, n), "float32"),
    )
    rows = (
        ((m, low), "int8"),
        ((m, 1 if two_level else groups), "float32"),
        ((m, shape.outliers), "int8"),
        ((m, 1), "float32"),
    )

    def operands(*args):
        x, rest = QuantizedRows(*args[:4]), args[4:]
        low, scale, channel, high, high_scale = rest if two_level else (rest[0], rest[1], None, *rest[2:])
        return x, PackedMatrix(low, scale, channel, high, high_scale)

    return (*rows, *weights), operands


def _low_bits(shape, two_level: bool) -> Case:
    arguments, operands = product(shape, two_level)
    sizes = (((shape.experts,), "int32"),) if shape.experts else ()

    def run(*args):
        x, matrix = operands(*args[: len(arguments)])
        return low_bits.int4_matmul(x, matrix, *args[len(arguments) :])

    return Case(run, (*arguments, *sizes), instruction=r"wgmma\.mma_async\S*\.s32\.s8\.s8")


def _wide_rows(shape) -> Case:
    """Activations of 16 bits, without outlier channels."""
    lead = (shape.experts,) if shape.experts else ()
    m, k, n = shape.rows, shape.inputs, shape.outputs
    weights = (((*lead, n, k // 2), "uint8"), ((*lead, n, k // shape.group), "float32"))
    sizes = (((shape.experts,), "int32"),) if shape.experts else ()

    def run(x, low, scale, *sizes):
        rows, matrix = QuantizedRows(x, None, None, None), PackedMatrix(low, scale, None, None, None)
        return low_bits.int4_matmul(rows, matrix, *sizes)

    return Case(run, (((m, k), "bfloat16"), *weights, *sizes), instruction=r"wgmma\.mma_async\S*\.bf16")


def _rounding(shape) -> Case:
    parts = (2,) if shape.before == "gated" else ()
    x: Array = ((shape.rows, *parts, shape.channels), "bfloat16")
    order, scale = ((shape.channels,), "int32"), ((shape.channels,), "bfloat16")
    settings = {**shape.settings, "outlier_bits": 8}

    def plain(x, order):
        return rounding.quantize(x, order, **settings)

    def normed(x, order, scale):
        return rounding.quantize(Normed(x, scale, 1e-5), order, **settings)

    def gated(x):
        return rounding.quantize(Gated(x, jax.nn.silu), None, **settings)

    match shape.before:
        case "normed":
            return Case(normed, (x, order, scale))
        case "gated":
            return Case(gated, (x,))
    return Case(plain, (x, order))


LOW_BIT_CASES = {
    **{f"int4_matmul w4a8 {name}": _low_bits(shape, True) for name, shape in LOW_BIT_SHAPES.items()},
    **{f"int4_matmul w4a4 {name}": _low_bits(shape, False) for name, shape in LOW_BIT_SHAPES.items()},
    **{f"int4_matmul w4a16 {name}": _wide_rows(shape) for name, shape in LOW_BIT_SHAPES.items()},
    **{f"quantize {name}": _rounding(shape) for name, shape in ROUNDING_SHAPES.items()},
}
