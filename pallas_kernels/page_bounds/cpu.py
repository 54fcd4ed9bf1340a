"""page_bounds as a native CPU kernel: one pass over the new keys, no copy of the bounds."""

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register
from pallas_kernels.page_bounds.xla import around

DTYPES = ("float32", "bfloat16")
WIDEST_VECTOR = 16


def page_bounds(
    bounds: jax.Array, layer: jax.Array | int, k: jax.Array, slots: jax.Array, *, page_size: int
) -> jax.Array:
    """See `api.page_bounds`."""
    dtype = jnp.dtype(bounds.dtype).name
    if dtype not in DTYPES or bounds.shape[4] % WIDEST_VECTOR:
        raise NotImplementedError(
            f"bounds of {dtype}, head dimension {bounds.shape[4]}; {DTYPES}, multiples of {WIDEST_VECTOR}"
        )
    name = f"pallas_kernels.page_bounds.{dtype}"
    register(name, "pallas_kernels.page_bounds._native", f"{dtype}_handler")
    result = jax.ShapeDtypeStruct(bounds.shape, bounds.dtype)
    call = jax.ffi.ffi_call(name, result, input_output_aliases={0: 0}, vmap_method="sequential")
    layer, slots = jnp.asarray(layer, jnp.int32), slots.astype(jnp.int32)
    return call(bounds, around(k, bounds.dtype), layer, slots, jnp.int32(page_size))
