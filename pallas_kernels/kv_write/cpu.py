"""kv_write as a native CPU kernel: one short copy per token and head, no copy of the pool."""

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register

NAME = "pallas_kernels.kv_write"


def kv_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: jax.Array | int,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See `api.kv_write`."""
    register(NAME, "pallas_kernels.kv_write._native")
    dtype = k_pages.dtype
    # The kernel moves whole rows; rows as bytes make it the same for every dtype.
    row_bytes = jnp.int32(k_pages.shape[4] * dtype.itemsize)
    layer = jnp.asarray(layer, jnp.int32)
    slots = slots.astype(jnp.int32)
    results = [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (k_pages, v_pages)]
    call = jax.ffi.ffi_call(NAME, tuple(results), input_output_aliases={0: 0, 1: 1}, vmap_method="sequential")
    k_pages, v_pages = call(k_pages, v_pages, k.astype(dtype), v.astype(dtype), layer, slots, row_bytes)
    return k_pages, v_pages
