"""Public face of quantize."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.quantize import xla
from pallas_kernels.quantize.inputs import Inputs
from pallas_kernels.quantize.rows import QuantizedRows


def quantize(
    x: Inputs,
    order: jax.Array | None = None,
    *,
    bits: int,
    group: int = 0,
    clip: float = 1.0,
    outliers: int = 0,
    outlier_bits: int = 8,
    implementation: str | None = None,
) -> QuantizedRows:
    """Reorders the channels of x and rounds them, symmetrically, to integers: Atom's dynamic quantization (section 4).

    x: [M, K] float, or the `Normed` or `Gated` that is to be computed first
    order: int32 [K], which channel comes first, second, ...; None keeps them as they are
    bits: of all channels but the last `outliers`: 4, 8, or 16, which leaves them as they are
    group: channels that share a scale, a divisor of K - outliers; 0 is one scale a row
    clip: the scale is clip * largest magnitude / (2**(bits - 1) - 1), at least 1e-5 for the magnitude
    outliers: channels, the last after reordering, that get `outlier_bits` (8 or 16), a scale of their own and no clip
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "xla": xla.quantize}
    settings = {
        "bits": bits,
        "group": group,
        "clip": clip,
        "outliers": outliers,
        "outlier_bits": outlier_bits,
    }
    return dispatch("quantize", implementations, implementation, x, order, **settings)


def _mosaic_gpu(*args, **settings):
    from pallas_kernels.quantize import mosaic_gpu

    return mosaic_gpu.quantize(*args, **settings)
