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


def page_bytes(config: ModelConfig, page_size: int, dtype, *, bounds: bool = False) -> int:
    """Bytes that one page takes over all layers: keys, values and their bounds."""
    vectors = 2 * page_size + (2 if bounds else 0)
    return vectors * config.layers * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def make_pool(config: ModelConfig, pages: int, page_size: int, dtype, *, bounds: bool = False) -> KVPool:
    shape = (config.layers, pages, config.kv_heads, page_size, config.head_dim)
    limits = jnp.zeros((*shape[:3], 2, config.head_dim), dtype) if bounds else None
    return KVPool(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), limits)
