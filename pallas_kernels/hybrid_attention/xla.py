"""hybrid_attention as its two parts in sequence, each by the best implementation of the platform."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.page_attention import page_attention
from pallas_kernels.ragged_attention import ragged_attention


def hybrid_attention(
    q: jax.Array,
    k_pages: jax.Array | PackedPages,
    v_pages: jax.Array | PackedPages,
    layer: jax.Array | int,
    page_table: jax.Array,
    query_start: jax.Array,
    query_len: jax.Array,
    kv_len: jax.Array,
    single: jax.Array,
    page_lists: jax.Array,
    tokens: jax.Array,
    *,
    scale: float,
    window: jax.Array | int,
    implementation: str | None = None,
) -> jax.Array:
    """See `api.hybrid_attention`; `implementation` is that of both parts."""
    pools = (k_pages, v_pages, layer)
    attend = functools.partial(page_attention, scale=scale, implementation=implementation)
    singles = attend(q[query_start], *pools, page_lists, tokens)
    rows = (page_table, query_start, jnp.where(single, 0, query_len), kv_len)
    out = ragged_attention(q, *pools, *rows, scale=scale, window=window, implementation=implementation)
    return merge(out, singles, query_start, single)


def merge(out: jax.Array, singles: jax.Array, query_start: jax.Array, single: jax.Array) -> jax.Array:
    """out [T, Hq, D] with the tokens of single rows from singles [S, Hq, D]."""
    return out.at[jnp.where(single, query_start, out.shape[0])].set(singles, mode="drop")
