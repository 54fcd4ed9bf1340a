"""page_scores as a native CPU kernel: each page's bounds stream through once for all query heads of the group."""

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register
from pallas_kernels.page_bounds import Bounds, ScaledBounds
from pallas_kernels.page_scores.xla import factors

DTYPES = ("float32", "bfloat16", "int8")
WIDEST_VECTOR = 16


def page_scores(
    q: jax.Array,
    bounds: Bounds,
    layer: jax.Array | int,
    page_table: jax.Array,
    kv_len: jax.Array,
    *,
    page_size: int,
    spread: float,
) -> jax.Array:
    """See `api.page_scores`."""
    rows, q_heads, head_dim = q.shape
    dtype = jnp.dtype(bounds.dtype).name
    if dtype not in DTYPES or head_dim % WIDEST_VECTOR:
        raise NotImplementedError(
            f"bounds of {dtype}, head dimension {head_dim}; {DTYPES}, multiples of {WIDEST_VECTOR}"
        )
    name = f"pallas_kernels.page_scores.{dtype}"
    register(name, "pallas_kernels.page_scores._native", f"{dtype}_handler")
    signed = jnp.stack(factors(q.astype(jnp.float32), spread), axis=2)  # [S, Hq, 2, D], as the bounds
    result = jax.ShapeDtypeStruct((rows, q_heads, page_table.shape[1]), jnp.float32)
    pages = -(-kv_len.astype(jnp.int32) // page_size)
    call = jax.ffi.ffi_call(name, result, vmap_method="sequential")
    of_rows = (jnp.asarray(layer, jnp.int32), page_table.astype(jnp.int32), pages)
    if isinstance(bounds, ScaledBounds):
        return call(signed, bounds.values, *of_rows, bounds.scales)
    return call(signed, bounds, *of_rows)
