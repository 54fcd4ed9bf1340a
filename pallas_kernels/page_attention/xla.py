"""page_attention in jnp and lax: online softmax over blocks of listed pages; the trip count follows the real lengths."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.packed_pages import PackedPages, gather

KEY_BLOCK = 256
# Stands for minus infinity in running maxima: finite, so that a difference of two of them is not NaN.
LOWEST = -1e30


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
    kv_heads, page_size = k_pages.shape[2:4]
    heads = max(page_lists.shape[1], kv_heads)  # that read pages, each for its own query heads
    pages = max(1, KEY_BLOCK // page_size)
    lists = jnp.broadcast_to(page_lists, (rows, heads, page_lists.shape[2]))
    lists = jnp.pad(lists, ((0, 0), (0, 0), (0, -lists.shape[2] % pages)))
    tokens = jnp.broadcast_to(tokens, (rows, heads))
    reads = jnp.arange(heads) // (heads // kv_heads)
    queries = (q.astype(jnp.float32) * scale).reshape(rows, heads, q_heads // heads, head_dim)

    def block(i, state):
        top, total, acc = state
        ids = lax.dynamic_slice_in_dim(lists, i * pages, pages, 2)
        shape = (rows, heads, pages * page_size, head_dim)
        k, v = (
            gather(pool, (layer, ids, reads[:, None]), head_dim).reshape(shape) for pool in (k_pages, v_pages)
        )
        held = i * pages * page_size + jnp.arange(pages * page_size) < tokens[..., None]  # [S, H, keys]
        scores = jnp.einsum("shgd,shkd->shgk", queries, k, precision=lax.Precision.HIGHEST)
        scores = jnp.where(held[:, :, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        keep = jnp.exp(top - new_top)
        # What no token has written may be NaN, and NaN times a weight of 0 is NaN.
        v = jnp.where(held[..., None], v, 0)
        part = jnp.einsum("shgk,shkd->shgd", weights, v, precision=lax.Precision.HIGHEST)
        return new_top, total * keep + weights.sum(-1), acc * keep[..., None] + part

    group = queries.shape[:3]
    start = (jnp.full(group, LOWEST), jnp.zeros(group), jnp.zeros(queries.shape))
    blocks = -(-tokens.max(initial=0) // (pages * page_size))
    _, total, acc = lax.fori_loop(0, blocks, block, start)
    out = acc / jnp.where(total > 0, total, 1)[..., None]
    return out.reshape(q.shape).astype(q.dtype)
