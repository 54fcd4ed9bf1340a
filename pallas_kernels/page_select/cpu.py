"""page_select as a native CPU kernel: a radix search for the threshold, then one pass in page order; no sort."""

import os

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register

NAME = "pallas_kernels.page_select"
MAX_WORKERS = 64
BINS = 2**8


def page_select(
    scores: jax.Array,
    pages: jax.Array,
    keep: jax.Array,
    *,
    width: int,
    first: int,
    last: int,
    scale: float,
    top_p: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.page_select`."""
    register(NAME, "pallas_kernels.page_select._native")
    rows, heads, _, total = scores.shape
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    results = (
        jax.ShapeDtypeStruct((rows, heads, width), jnp.int32),
        jax.ShapeDtypeStruct((rows, heads), jnp.int32),
        jax.ShapeDtypeStruct((workers, 2 * total + BINS), jnp.int32),
    )
    settings = jnp.array([first, last], jnp.int32), jnp.array([scale, top_p], jnp.float32)
    call = jax.ffi.ffi_call(NAME, results, vmap_method="sequential")
    positions, number, _ = call(scores, pages.astype(jnp.int32), keep.astype(jnp.int32), *settings)
    return positions, number
