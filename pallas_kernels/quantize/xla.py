"""quantize as plain array operations, which XLA joins with whatever comes before: the reference."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize.inputs import Inputs, values
from pallas_kernels.quantize.rows import QuantizedRows

SMALLEST = 1e-5  # the least magnitude that a group of activations is taken to have


def quantize(
    x: Inputs,
    order: jax.Array | None,
    *,
    bits: int,
    group: int,
    clip: float,
    outliers: int,
    outlier_bits: int,
) -> QuantizedRows:
    """See `api.quantize`."""
    x = values(x)
    if order is not None:
        x = x[:, order]
    kept = x.shape[1] - outliers
    low = _part(x[:, :kept], bits, group or kept, clip)
    high = _part(x[:, kept:], outlier_bits, outliers, 1.0)
    return QuantizedRows(*low, *high)


def _part(x: jax.Array, bits: int, group: int, clip: float) -> tuple[jax.Array | None, jax.Array | None]:
    if x.shape[1] == 0:
        return None, None
    if bits == 16:
        return x, None
    most = 2 ** (bits - 1) - 1
    groups = x.astype(jnp.float32).reshape(x.shape[0], x.shape[1] // group, group)
    largest = jnp.maximum(jnp.abs(groups).max(-1, keepdims=True), SMALLEST)
    scale = jnp.float32(clip) * largest / most
    codes = jnp.clip(jnp.round(groups / scale), -most - 1, most)
    return codes.astype(jnp.int8).reshape(x.shape), scale[..., 0]
