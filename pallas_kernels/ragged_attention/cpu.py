"""ragged_attention as a native CPU kernel: decode rows stream their pages once, prefill tiles run on register tiles."""

import os

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register

DTYPES = ("float32", "bfloat16")
PAGE_SIZES = (8, 16, 32)
# Query rows (tokens times group) of a prefill tile: enough to pay for packing the keys, few enough for the cache.
TILE_ROWS = 144
# Keys of one step of the online softmax, at fixed multiples of it whatever the chunking.
PREFILL_KEYS = 128
MAX_WORKERS = 64


def ragged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    query_start: jax.Array,
    query_len: jax.Array,
    kv_len: jax.Array,
    *,
    scale: float,
    window: jax.Array | int,
) -> jax.Array:
    """See `api.ragged_attention`."""
    tokens, q_heads, head_dim = q.shape
    _, _, kv_heads, page_size, _ = k_pages.shape
    dtype = jnp.dtype(k_pages.dtype).name
    if dtype not in DTYPES or v_pages.dtype != k_pages.dtype:
        raise NotImplementedError(f"pools of {dtype} and {v_pages.dtype}; both must be one of {DTYPES}")
    if page_size not in PAGE_SIZES or head_dim % 8:
        raise NotImplementedError(
            f"page size {page_size}, head dimension {head_dim}; {PAGE_SIZES}, multiples of 8"
        )
    module = "pallas_kernels.ragged_attention._native"
    name = register(
        f"pallas_kernels.ragged_attention.{dtype}", module, f"{dtype}_handler", tiles=("float32", dtype)
    )

    group = q_heads // kv_heads
    tile = max(8, TILE_ROWS // group)
    items = query_len.shape[0] + tokens // tile + 1
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    results = (
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct((2 * items + tokens,), jnp.int32),
        jax.ShapeDtypeStruct((workers, _scratch_floats(tile * group, head_dim)), jnp.float32),
    )
    out, *_ = jax.ffi.ffi_call(name, results, vmap_method="sequential")(
        q.astype(jnp.float32) * scale,
        k_pages,
        v_pages,
        jnp.asarray(layer, jnp.int32),
        *(a.astype(jnp.int32) for a in (page_table, query_start, query_len, kv_len)),
        jnp.asarray(window, jnp.int32),
        jnp.int32(tile),
    )
    return out.astype(q.dtype)


def _scratch_floats(rows: int, head_dim: int) -> int:
    """One worker's queries, outputs, scores, maxima and sums of a prefill tile, and a block of keys and values."""
    return rows * (2 * head_dim + PREFILL_KEYS + 2) + 2 * PREFILL_KEYS * head_dim + 64
