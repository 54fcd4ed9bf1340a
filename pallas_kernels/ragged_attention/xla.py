"""ragged_attention in jnp and lax: online softmax (FlashAttention-2, algorithm 1) over blocks of pages.

Decode rows go together, one query each; a prefill row goes by tiles of queries. Trip counts are dynamic, so time
follows the real lengths and memory stays that of one block.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.packed_pages import PackedPages, gather

QUERY_TILE = 128
KEY_BLOCK = 256
# Stands for minus infinity in running maxima: finite, so that a difference of two of them is not NaN.
LOWEST = -1e30


def ragged_attention(
    q: jax.Array,
    k_pages: jax.Array | PackedPages,
    v_pages: jax.Array | PackedPages,
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
    kv_heads = k_pages.shape[2]
    tile = min(QUERY_TILE, max(tokens, 1))
    # Padded so that a tile that starts at the last token stays inside.
    queries = jnp.pad(q.astype(jnp.float32) * scale, ((0, tile), (0, 0), (0, 0)))
    queries = queries.reshape(tokens + tile, kv_heads, q_heads // kv_heads, head_dim)
    window = jnp.where(jnp.asarray(window) > 0, window, jnp.iinfo(jnp.int32).max).astype(jnp.int32)
    page_table = _pad_to_blocks(page_table, k_pages.shape[3])

    def attend(tile_queries, table, first, count):
        return _attend(tile_queries, k_pages, v_pages, layer, table, first, count, window)

    out = jnp.zeros(queries.shape, jnp.float32)
    out = _decode_rows(attend, queries, out, page_table, query_start, query_len, kv_len)
    out = _prefill_rows(attend, queries, out, page_table, query_start, query_len, kv_len, tile)
    return out[:tokens].reshape(q.shape).astype(q.dtype)


def _decode_rows(attend, queries, out, page_table, query_start, query_len, kv_len):
    """Every row with one query, at once; queries, out: [T, Hkv, G, D]."""
    decode = query_len == 1
    positions = jnp.where(decode, kv_len - 1, -1)
    result = attend(queries[query_start][:, None], page_table, positions, decode.astype(jnp.int32))
    rows = jnp.where(decode, query_start, out.shape[0])
    return out.at[rows].set(result[:, 0], mode="drop")


def _prefill_rows(attend, queries, out, page_table, query_start, query_len, kv_len, tile):
    """Row by row, tile by tile; queries, out: [T + tile, Hkv, G, D]."""

    def one_tile(s, t, out):
        start = query_start[s] + t * tile
        count = jnp.minimum(query_len[s] - t * tile, tile)
        first = kv_len[s] - query_len[s] + t * tile
        tile_queries = lax.dynamic_slice_in_dim(queries, start, tile)
        result = attend(tile_queries[None], page_table[s][None], first[None], count[None])[0]
        old = lax.dynamic_slice_in_dim(out, start, tile)
        mine = (jnp.arange(tile) < count)[:, None, None, None]
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, result, old), start, 0)

    def one_row(s, out):
        tiles = jnp.where(query_len[s] > 1, -(-query_len[s] // tile), 0)
        return lax.fori_loop(0, tiles, lambda t, out: one_tile(s, t, out), out)

    return lax.fori_loop(0, query_len.shape[0], one_row, out)


def _attend(queries, k_pages, v_pages, layer, page_table, first, count, window):
    """B rows of Q queries each, `count` of them real, at positions first, first + 1, ...

    queries: [B, Q, Hkv, G, D]; page_table: [B, blocks * pages per block]; first, count: int32 [B]
    """
    rows, length, kv_heads, group, head_dim = queries.shape
    page_size = k_pages.shape[3]
    pages = max(1, KEY_BLOCK // page_size)
    keys = pages * page_size
    position = first[:, None] + jnp.arange(length)
    lowest = jnp.maximum(position + 1 - window, 0)
    real = count > 0
    begin = jnp.min(jnp.where(real, jnp.maximum(first + 1 - window, 0), jnp.iinfo(jnp.int32).max)) // keys
    end = -(-jnp.max(jnp.where(real, first + count, 0)) // keys)

    def block(i, state):
        top, total, acc = state
        ids = lax.dynamic_slice_in_dim(page_table, i * pages, pages, 1)
        k, v = (
            gather(pool, (layer, ids), head_dim) for pool in (k_pages, v_pages)
        )  # [B, pages, Hkv, page, D]
        p = i * keys + jnp.arange(keys)
        # Past the row's end anything may lie, and NaN times a weight of 0 is NaN.
        written = (p < (first + count)[:, None]).reshape(rows, pages, 1, page_size, 1)
        v = jnp.where(written, v, 0)
        scores = jnp.einsum("bqhgd,bnhpd->bhgqnp", queries, k, precision=lax.Precision.HIGHEST)
        scores = scores.reshape(rows, kv_heads, group, length, keys)
        seen = (p <= position[..., None]) & (p >= lowest[..., None])  # [B, Q, keys]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        keep = jnp.exp(top - new_top)
        values = weights.reshape(rows, kv_heads, group, length, pages, page_size)
        part = jnp.einsum("bhgqnp,bnhpd->bhgqd", values, v, precision=lax.Precision.HIGHEST)
        return new_top, total * keep + weights.sum(-1), acc * keep[..., None] + part

    shape = (rows, kv_heads, group, length)
    start = (jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    _, total, acc = lax.fori_loop(begin, jnp.maximum(begin, end), block, start)
    result = acc / jnp.where(total > 0, total, 1)[..., None]
    return result.transpose(0, 3, 1, 2, 4)


def _pad_to_blocks(page_table, page_size):
    pages = max(1, KEY_BLOCK // page_size)
    return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
