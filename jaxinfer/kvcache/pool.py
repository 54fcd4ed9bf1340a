"""The pool of KV pages on the device."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.models.config import ModelConfig


class KVPool(NamedTuple):
    """Keys and values of every layer: [layers, pages, kv_heads, page_size, head_dim] each.

    A page of one head is one contiguous copy. Keys are stored after rotation. Page 0 is the padding page.

    Attributes:
      bounds: [layers, pages, kv_heads, 2, head_dim], smallest and largest key of each page by channel; None where nothing
        chooses pages by them.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    bounds: jax.Array | None = None

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[3]


def page_bytes(config: ModelConfig, page_size: int, dtype, bounds=None) -> int:
    """Bytes that one page takes over all layers: keys, values and, in the type `bounds`, their bounds."""
    channels = 2 * config.layers * config.kv_heads * config.head_dim
    size = page_size * jnp.dtype(dtype).itemsize + (0 if bounds is None else jnp.dtype(bounds).itemsize)
    return channels * size


def make_pool(config: ModelConfig, pages: int, page_size: int, dtype, bounds=None) -> KVPool:
    """An empty pool; `bounds` is the type of the bounds, None for a pool without."""
    shape = (config.layers, pages, config.kv_heads, page_size, config.head_dim)
    limits = None if bounds is None else jnp.zeros((*shape[:3], 2, config.head_dim), bounds)
    return KVPool(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), limits)
