"""The pool of KV pages on the device."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.models.config import ModelConfig


class KVPool(NamedTuple):
    """Keys and values of every layer: [layers, pages, kv_heads, page_size, head_dim] each.

    A page of one head is one contiguous copy. Keys are stored after rotation. Page 0 is the padding page.
    """

    k_pages: jax.Array
    v_pages: jax.Array


def page_bytes(config: ModelConfig, page_size: int, dtype) -> int:
    """Bytes that one page takes over all layers, keys and values."""
    return 2 * config.layers * config.kv_heads * page_size * config.head_dim * jnp.dtype(dtype).itemsize


def make_pool(config: ModelConfig, pages: int, page_size: int, dtype) -> KVPool:
    shape = (config.layers, pages, config.kv_heads, page_size, config.head_dim)
    return KVPool(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
