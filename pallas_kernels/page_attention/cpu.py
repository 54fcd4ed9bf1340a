"""page_attention as a native CPU kernel: the decode of ragged_attention with a list of pages for each KV head."""

import os

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.ragged_attention.cpu import MAX_WORKERS, pool_arrays, tiles


def page_attention(
    q: jax.Array,
    k_pages: jax.Array | PackedPages,
    v_pages: jax.Array | PackedPages,
    layer: jax.Array | int,
    page_lists: jax.Array,
    tokens: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """See `api.page_attention`."""
    rows, q_heads, head_dim = q.shape
    _, _, kv_heads, page_size, _ = k_pages.shape
    _, lists, width = page_lists.shape
    kind, pools, words = pool_arrays(k_pages, v_pages, head_dim)
    if lists not in (1, kv_heads):
        return _one_list_per_query_head(q, k_pages, v_pages, layer, page_lists, tokens, scale)
    module = "pallas_kernels.page_attention._native"
    name = register(f"pallas_kernels.page_attention.{kind}", module, f"{kind}_handler", tiles=tiles(kind))
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    results = (
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct((workers, _scratch_floats(q_heads // kv_heads, head_dim)), jnp.float32),
    )
    tokens = jnp.clip(tokens.astype(jnp.int32), 0, width * page_size).reshape(-1)
    row_of_list = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), lists)
    out, _ = jax.ffi.ffi_call(name, results, vmap_method="sequential")(
        q.astype(jnp.float32) * scale,
        *pools,
        jnp.asarray(layer, jnp.int32),
        page_lists.astype(jnp.int32).reshape(rows * lists, width),
        row_of_list,
        jnp.int32(lists),
        tokens,
        jnp.int32(0),
        jnp.int32(0),
        *words,
    )
    return out.astype(q.dtype)


def _one_list_per_query_head(q, k_pages, v_pages, layer, page_lists, tokens, scale):
    """As rows of one query head per KV head: [S, Hkv * G, ...] -> [S * G, Hkv, ...] and back."""
    rows, q_heads = q.shape[:2]
    kv_heads = k_pages.shape[2]
    group = q_heads // kv_heads

    def regroup(x):
        grouped = x.reshape(rows, kv_heads, group, *x.shape[2:]).swapaxes(1, 2)
        return grouped.reshape(rows * group, kv_heads, *x.shape[2:])

    q, page_lists, tokens = regroup(q), regroup(page_lists), regroup(tokens)
    out = page_attention(q, k_pages, v_pages, layer, page_lists, tokens, scale=scale)
    return out.reshape(rows, group, kv_heads, -1).swapaxes(1, 2).reshape(rows, q_heads, -1)


def _scratch_floats(group: int, head_dim: int) -> int:
    """One worker's scores of a block of keys, maxima and sums, and a block of unpacked keys."""
    from pallas_kernels.ragged_attention._decode import BLOCK

    return (BLOCK + 2) * group + BLOCK * head_dim + 64
