"""Public face of page_attention."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.page_attention import xla


def page_attention(
    q: jax.Array,
    k_pages: jax.Array | PackedPages,
    v_pages: jax.Array | PackedPages,
    layer: jax.Array | int,
    page_lists: jax.Array,
    tokens: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of one query per row and head over the tokens of a list of pages; float32 inside.

    q: [S, Hq, D]
    k_pages, v_pages: [L, N, Hkv, page, D], or both PackedPages of such keys and values; Hq % Hkv == 0, query head h
        reads kv head h // (Hq // Hkv)
    layer: int32 scalar, may be traced
    page_lists: int32 [S, H, W], ids of pages; H is 1 (all heads read the same pages, as in dense attention), Hkv (the
        query heads of a kv head share a list) or Hq; entries past the tokens are not read as keys, but lie in [0, N)
    tokens: int32 [S, H], how many tokens the list holds: all its pages are full but for the last one listed; 0 is a
        padding row
    scale: factor on the scores
    returns [S, Hq, D] in q.dtype, zeros for padding rows
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "cpu": _cpu, "xla": xla.page_attention}
    args = (q, k_pages, v_pages, layer, page_lists, tokens)
    return dispatch("page_attention", implementations, implementation, *args, scale=scale)


def _cpu(*args, **kwargs):
    from pallas_kernels.page_attention import cpu

    return cpu.page_attention(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    from pallas_kernels.page_attention import mosaic_gpu

    return mosaic_gpu.page_attention(*args, **kwargs)
