"""page_bounds as scatters: the reference, and the path of machines without a kernel."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.page_bounds.scaled import LARGEST, SMALLEST_SCALE, Bounds, ScaledBounds, scale_for


def page_bounds(
    bounds: Bounds, layer: jax.Array | int, k: jax.Array, slots: jax.Array, *, page_size: int
) -> Bounds:
    """See `api.page_bounds`."""
    pages = bounds.shape[1]
    # An index past the end is dropped by the scatter; a negative one would count from the back.
    page_id = jnp.where(slots < 0, pages, slots // page_size)
    begun = jnp.where(slots % page_size == 0, page_id, pages)
    if isinstance(bounds, ScaledBounds):
        return _scaled(bounds, layer, k.astype(jnp.float32), page_id, begun)
    new = around(k, bounds.dtype)
    nothing_yet = jnp.array([jnp.inf, -jnp.inf], bounds.dtype)[:, None]
    bounds = bounds.at[layer, begun].set(nothing_yet, mode="drop")
    bounds = bounds.at[layer, page_id, :, 0].min(new[:, :, 0], mode="drop")
    return bounds.at[layer, page_id, :, 1].max(new[:, :, 1], mode="drop")


def _scaled(bounds: ScaledBounds, layer, k, page_id, begun) -> ScaledBounds:
    values, scales = bounds
    before = scales.at[layer, begun].set(SMALLEST_SCALE, mode="drop")
    scales = before.at[layer, page_id].max(scale_for(jnp.abs(k).max(axis=-1)), mode="drop")
    written = jnp.minimum(page_id, values.shape[1] - 1)
    scale = scales[layer, written]  # [T, Hkv]
    coarser = (before[layer, written] / scale)[..., None, None]
    # Both as minima; all tokens of a page write the same.
    sign = jnp.array([1, -1], jnp.float32)[:, None]
    held = jnp.floor(values[layer, written].astype(jnp.float32) * sign * coarser) * sign
    values = values.at[layer, page_id].set(held.astype(jnp.int8), mode="drop")
    nothing_yet = jnp.array([LARGEST, -LARGEST], jnp.int8)[:, None]
    values = values.at[layer, begun].set(nothing_yet, mode="drop")
    low, high = (jnp.floor(x / scale[..., None]).astype(jnp.int8) for x in (k, -k))
    values = values.at[layer, page_id, :, 0].min(low, mode="drop")
    return ScaledBounds(values.at[layer, page_id, :, 1].max(-high, mode="drop"), scales)


def around(k: jax.Array, dtype) -> jax.Array:
    """Each key as its own bounds, [T, Hkv, D] -> [T, Hkv, 2, D], rounded outward where dtype holds fewer digits."""
    if k.dtype == dtype or jnp.promote_types(k.dtype, dtype) == dtype:
        return jnp.stack([k, k], axis=2).astype(dtype)
    if (k.dtype, dtype) != (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"keys of {k.dtype} for bounds of {dtype}: expected the same, or float32 for bfloat16"
        )
    return jnp.stack([_rounded_down(k), -_rounded_down(-k)], axis=2)


def _rounded_down(x: jax.Array) -> jax.Array:
    """The largest bfloat16 no larger than x: a bfloat16 is the upper half of a float32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    cut = bits & ~0xFFFF  # towards zero, which is down unless x is negative
    down = jnp.where((bits < 0) & (bits != cut), cut + 0x10000, cut)
    return lax.bitcast_convert_type(down, jnp.float32).astype(jnp.bfloat16)
