"""Public face of ragged_attention."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.ragged_attention import xla


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
    window: jax.Array | int = 0,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of every row's queries over that row's pages; accumulates in float32.

    q: [T, Hq, D]
    k_pages, v_pages: [L, N, Hkv, page, D], or both PackedPages of such keys and values; the keys of this step already
        written; Hq % Hkv == 0, query head h reads kv head h // (Hq // Hkv); what lies past a row's kv_len has no
        influence, even where it is not finite
    layer: int32 scalar, may be traced
    page_table: int32 [S, P], the pages of row s in order; entries past its length are not read as keys
    query_start, query_len, kv_len: int32 [S]; row s owns q[query_start[s] :][: query_len[s]], the last query_len[s]
        of its kv_len[s] positions; query_len 0 is a padding row; query_len <= kv_len <= P * page
    scale: factor on the scores
    window: int32 scalar, may be traced; > 0 keeps only keys at p > position - window
    returns [T, Hq, D] in q.dtype, zeros for tokens that no row owns
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "cpu": _cpu, "xla": xla.ragged_attention}
    args = (q, k_pages, v_pages, layer, page_table, query_start, query_len, kv_len)
    return dispatch("ragged_attention", implementations, implementation, *args, scale=scale, window=window)


def _cpu(*args, **kwargs):
    from pallas_kernels.ragged_attention import cpu

    return cpu.ragged_attention(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    from pallas_kernels.ragged_attention import mosaic_gpu

    return mosaic_gpu.ragged_attention(*args, **kwargs)
