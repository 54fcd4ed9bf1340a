"""Public face of hybrid_matmul."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.hybrid_matmul import xla
from pallas_kernels.int4_matmul import PackedMatrix
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.quantize import QuantizedRows


def hybrid_matmul(
    x: jax.Array | QuantizedRows,
    w: jax.Array | PackedMatrix,
    q: jax.Array,
    k_pages: jax.Array | PackedPages,
    v_pages: jax.Array | PackedPages,
    layer: jax.Array | int,
    page_lists: jax.Array,
    tokens: jax.Array,
    *,
    scale: float,
    pace: float = 1.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`x @ w` of some tokens, and `page_attention` of others, which has nothing to do with it.

    x, w: [M, K] and [K, N] of one type, or as in int4_matmul without group_sizes
    q, k_pages, v_pages, layer, page_lists, tokens, scale: as in page_attention
    pace: >= 1, for tuning beside a packed w: attention is handed out so many times as fast as would spread it evenly over the
      product; beside a plain one it has a queue of its own and pace has no meaning
    returns [M, N] and [S, Hq, D], both in q.dtype
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "xla": _in_sequence}
    args = (x, w, q, k_pages, v_pages, layer, page_lists, tokens)
    return dispatch("hybrid_matmul", implementations, implementation, *args, scale=scale, pace=pace)


def _in_sequence(*args, pace, **kwargs):
    return xla.hybrid_matmul(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    from pallas_kernels.hybrid_matmul import mosaic_gpu

    return mosaic_gpu.hybrid_matmul(*args, **kwargs)
