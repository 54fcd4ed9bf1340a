"""Public face of hybrid_attention."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.hybrid_attention import xla
from pallas_kernels.packed_pages import PackedPages


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
    window: jax.Array | int = 0,
    pace: float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """`ragged_attention` of the rows that are not single and `page_attention` of those that are.

    q, k_pages, v_pages, layer, page_table, query_start, query_len, kv_len, scale, window: as in ragged_attention
    single: bool [S], rows whose one token attends to their page_lists instead, without a window
    page_lists, tokens: int32 [S, H, W] and [S, H], as in page_attention; tokens are 0 for rows that are not single
    pace: >= 1, for tuning: decode work is handed out so many times as fast as would spread it evenly over the prefill work
    returns [T, Hq, D] in q.dtype, zeros for tokens that no row owns
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "xla": _in_sequence}
    of_rows = (page_table, query_start, query_len, kv_len, single, page_lists, tokens)
    settings = {"scale": scale, "window": window, "pace": pace}
    args = (q, k_pages, v_pages, layer, *of_rows)
    return dispatch("hybrid_attention", implementations, implementation, *args, **settings)


def _in_sequence(*args, pace, **kwargs):
    return xla.hybrid_attention(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    from pallas_kernels.hybrid_attention import mosaic_gpu

    return mosaic_gpu.hybrid_attention(*args, **kwargs)
