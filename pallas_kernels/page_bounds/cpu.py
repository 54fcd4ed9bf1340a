"""page_bounds as a native CPU kernel: one pass over the new keys, no copy of the bounds."""

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register
from pallas_kernels.page_bounds.scaled import Bounds, ScaledBounds
from pallas_kernels.page_bounds.xla import around

DTYPES = ("float32", "bfloat16", "int8")
WIDEST_VECTOR = 16


def page_bounds(
    bounds: Bounds, layer: jax.Array | int, k: jax.Array, slots: jax.Array, *, page_size: int
) -> Bounds:
    """See `api.page_bounds`."""
    dtype = jnp.dtype(bounds.dtype).name
    if dtype not in DTYPES or bounds.shape[4] % WIDEST_VECTOR:
        raise NotImplementedError(
            f"bounds of {dtype}, head dimension {bounds.shape[4]}; {DTYPES}, multiples of {WIDEST_VECTOR}"
        )
    name = f"pallas_kernels.page_bounds.{dtype}"
    register(name, "pallas_kernels.page_bounds._native", f"{dtype}_handler")
    where = jnp.asarray(layer, jnp.int32), slots.astype(jnp.int32), jnp.int32(page_size)
    result = jax.ShapeDtypeStruct(bounds.shape, bounds.dtype)
    if isinstance(bounds, ScaledBounds):
        results = (result, jax.ShapeDtypeStruct(bounds.scales.shape, jnp.float32))
        aliases = {0: 0, 5: 1}
        scaled = jax.ffi.ffi_call(name, results, input_output_aliases=aliases, vmap_method="sequential")
        values, scales = scaled(bounds.values, k.astype(jnp.float32), *where, bounds.scales)
        return ScaledBounds(values, scales)
    call = jax.ffi.ffi_call(name, result, input_output_aliases={0: 0}, vmap_method="sequential")
    return call(bounds, around(k, bounds.dtype), *where)
