"""hybrid_matmul as its two parts in sequence, each by the best implementation of the platform."""

import jax

from pallas_kernels.int4_matmul import PackedMatrix, int4_matmul
from pallas_kernels.matmul import matmul
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.page_attention import page_attention
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
) -> tuple[jax.Array, jax.Array]:
    """See `api.hybrid_matmul`."""
    if isinstance(x, QuantizedRows):
        assert isinstance(w, PackedMatrix)
        product = int4_matmul(x, w)
    else:
        assert not isinstance(w, PackedMatrix)
        product = matmul(x, w)
    return product.astype(q.dtype), page_attention(
        q, k_pages, v_pages, layer, page_lists, tokens, scale=scale
    )
