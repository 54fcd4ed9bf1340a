"""Attention over the pool's pages: what a step's tokens see, everything or the pages that Quest chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.attention.quest import QuestPolicy, choose
from jaxinfer.kvcache.pool import KVPool
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Attend
from pallas_kernels.kv_write import kv_write
from pallas_kernels.packed_pages import PackedPages, pack, unpack
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_bounds import page_bounds
from pallas_kernels.ragged_attention import ragged_attention


class PagedRows(NamedTuple):
    """The rows of a step. int32 [S] each but for page_table [S, P].

    Attributes:
      starts, counts: row s owns the flat tokens [starts[s], starts[s] + counts[s]); 0 tokens is a padding row.
      kv_lengths: keys of the row once this step is written.
      single: 1 where the row's one token takes the attention of decoding; under a policy it chooses its pages.
    """

    page_table: jax.Array
    starts: jax.Array
    counts: jax.Array
    kv_lengths: jax.Array
    single: jax.Array


def paged_attention(
    config: ModelConfig, policy: QuestPolicy | None, rows: PagedRows, kv_slots: jax.Array, *, mixed: bool
) -> Attend:
    """The attention of a forward pass over flat tokens [T]: writes their keys and values, then attends.

    Args:
      policy: how single rows choose their pages; None lets every row attend to all its keys.
      kv_slots: int32 [T], page * page_size + offset; negative for padding.
      mixed: whether rows that are not single may be among them.
    """
    scale = 1 / math.sqrt(config.head_dim)
    single = (rows.single > 0) & (rows.counts > 0)
    lengths = jnp.where(single, rows.kv_lengths, 0)

    def attend(pool: KVPool, layer, q, k, v, window):
        pool = _write(pool, layer, k, v, kv_slots)

        def ragged(counts: jax.Array) -> jax.Array:
            of_rows = (rows.page_table, rows.starts, counts, rows.kv_lengths)
            return ragged_attention(
                q, pool.k_pages, pool.v_pages, layer, *of_rows, scale=scale, window=window
            )

        def with_singles(page_lists: jax.Array, tokens: jax.Array) -> jax.Array:
            pages = (pool.k_pages, pool.v_pages, layer, page_lists, tokens)
            singles = page_attention(q[rows.starts], *pages, scale=scale)
            others = ragged(jnp.where(single, 0, rows.counts)) if mixed else jnp.zeros_like(q)
            return others.at[jnp.where(single, rows.starts, q.shape[0])].set(singles, mode="drop")

        def to_all() -> jax.Array:
            if _decodes_apart(config):
                return with_singles(rows.page_table[:, None], lengths[:, None])
            return ragged(rows.counts)

        def to_chosen() -> jax.Array:
            assert policy is not None and pool.bounds is not None
            given = (q[rows.starts], pool.bounds, layer, rows.page_table, lengths)
            chosen = choose(policy, *given, scale=scale)
            return with_singles(chosen.page_lists, chosen.tokens)

        if policy is None:
            return to_all(), pool
        dense = (layer < policy.dense_layers) | (window > 0)
        return _either(dense, to_all, to_chosen), pool

    return attend


def _decodes_apart(config: ModelConfig) -> bool:
    """On a GPU decoding rows have a kernel of their own, which knows no windows; the CPU's takes all rows at once."""
    return jax.default_backend() == "gpu" and not any(config.windows)


def _write(pool: KVPool, layer, k: jax.Array, v: jax.Array, kv_slots: jax.Array) -> KVPool:
    k_pages, v_pages = kv_write(pool.k_pages, pool.v_pages, layer, k, v, kv_slots)
    bounds = pool.bounds
    if bounds is not None:
        bounds = page_bounds(bounds, layer, _stored(k, k_pages), kv_slots, page_size=pool.page_size)
    return KVPool(k_pages, v_pages, bounds)


def _stored(k: jax.Array, pages: jax.Array | PackedPages) -> jax.Array:
    """What the pool holds of k: bounds must be those of the keys that attention sees."""
    if isinstance(pages, PackedPages):
        bits = pages.bits(k.shape[-1])
        return unpack(*pack(k, bits), bits)
    return k.astype(pages.dtype)


def _either(condition, then: Callable[[], jax.Array], otherwise: Callable[[], jax.Array]) -> jax.Array:
    """Known while tracing where layers are unrolled, so that only one of both is compiled."""
    if isinstance(condition, jax.core.Tracer):
        return jax.lax.cond(condition, then, otherwise)
    return then() if condition else otherwise()
