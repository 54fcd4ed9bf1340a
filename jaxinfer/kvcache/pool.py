"""The pool of KV pages on the device."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.models.config import ModelConfig
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.page_bounds import Bounds, bounds_bytes, make_bounds

PACKED_BITS = {"int8": 8, "int4": 4}
WORD_BYTES = 4  # of a packed token's step and smallest value, see PackedPages


class KVPool(NamedTuple):
    """Keys and values of every layer: [layers, pages, kv_heads, page_size, head_dim] each, or PackedPages of such.

    A page of one head is one contiguous copy. Keys are stored after rotation. Page 0 is the padding page.

    Attributes:
      bounds: smallest and largest key of each page by channel, see page_bounds; None where nothing chooses pages by them.
    """

    k_pages: jax.Array | PackedPages
    v_pages: jax.Array | PackedPages
    bounds: Bounds | None = None

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[3]


def page_bytes(config: ModelConfig, page_size: int, dtype: str, bounds: str | None = None) -> int:
    """Bytes that one page takes over all layers: keys, values and, in the type `bounds`, their bounds.

    dtype: "int8" and "int4" are packed, others as NumPy names them.
    """
    if dtype in PACKED_BITS:
        token = config.head_dim * PACKED_BITS[dtype] // 8 + WORD_BYTES
    else:
        token = config.head_dim * jnp.dtype(dtype).itemsize
    limits = 0 if bounds is None else bounds_bytes(config.head_dim, bounds)
    return config.layers * config.kv_heads * (2 * page_size * token + limits)


def make_pool(
    config: ModelConfig, pages: int, page_size: int, dtype: str, bounds: str | None = None
) -> KVPool:
    """An empty pool; `dtype` as in page_bytes, `bounds` is the type of the bounds, None for a pool without."""
    shape = (config.layers, pages, config.kv_heads, page_size, config.head_dim)

    def make() -> jax.Array | PackedPages:
        if dtype not in PACKED_BITS:
            return jnp.zeros(shape, dtype)
        codes = (*shape[:4], config.head_dim * PACKED_BITS[dtype] // 8)
        return PackedPages(jnp.zeros(codes, jnp.uint8), jnp.zeros(shape[:4], jnp.int32))

    limits = None if bounds is None else make_bounds((*shape[:3], config.head_dim), bounds)
    return KVPool(make(), make(), limits)
