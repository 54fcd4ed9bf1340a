"""Attention over the pool's pages: what a step's tokens see, everything or the pages that Quest chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.attention.quest import QuestPolicy, select
from jaxinfer.kvcache.pool import KVPool
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Attend
from pallas_kernels.kv_write import kv_write
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_bounds import page_bounds
from pallas_kernels.page_scores import page_scores
from pallas_kernels.ragged_attention import ragged_attention


class PagedRows(NamedTuple):
    """The rows of a step. int32 [S] each but for page_table [S, P].

    Attributes:
      starts, counts: row s owns the flat tokens [starts[s], starts[s] + counts[s]); 0 tokens is a padding row.
      kv_lengths: keys of the row once this step is written.
      sparse: 1 where the row is a single token that chooses its pages.
    """

    page_table: jax.Array
    starts: jax.Array
    counts: jax.Array
    kv_lengths: jax.Array
    sparse: jax.Array


def paged_attention(
    config: ModelConfig, policy: QuestPolicy | None, rows: PagedRows, kv_slots: jax.Array, *, mixed: bool
) -> Attend:
    """The attention of a forward pass over flat tokens [T]: writes their keys and values, then attends.

    Args:
      policy: how sparse rows choose; None lets every row attend to all its keys.
      kv_slots: int32 [T], page * page_size + offset; negative for padding.
      mixed: whether rows that are not sparse may be among them.
    """
    scale = 1 / math.sqrt(config.head_dim)

    def attend(pool: KVPool, layer, q, k, v, window):
        pool = _write(pool, layer, k, v, kv_slots)

        def to_all(counts) -> jax.Array:
            of_rows = (rows.page_table, rows.starts, counts, rows.kv_lengths)
            return ragged_attention(
                q, pool.k_pages, pool.v_pages, layer, *of_rows, scale=scale, window=window
            )

        def to_chosen() -> jax.Array:
            assert policy is not None
            single = (rows.sparse > 0) & (rows.counts > 0)
            few = _chosen(
                policy, pool, layer, q[rows.starts], rows, jnp.where(single, rows.kv_lengths, 0), scale
            )
            others = to_all(jnp.where(single, 0, rows.counts)) if mixed else jnp.zeros_like(q)
            return others.at[jnp.where(single, rows.starts, q.shape[0])].set(few, mode="drop")

        if policy is None:
            return to_all(rows.counts), pool
        dense = (layer < policy.dense_layers) | (window > 0)
        return _either(dense, lambda: to_all(rows.counts), to_chosen), pool

    return attend


def _write(pool: KVPool, layer, k: jax.Array, v: jax.Array, kv_slots: jax.Array) -> KVPool:
    k_pages, v_pages = kv_write(pool.k_pages, pool.v_pages, layer, k, v, kv_slots)
    bounds = pool.bounds
    if bounds is not None:
        bounds = page_bounds(bounds, layer, k, kv_slots, page_size=pool.page_size)
    return KVPool(k_pages, v_pages, bounds)


def _chosen(
    policy: QuestPolicy, pool: KVPool, layer, q: jax.Array, rows: PagedRows, kv_lengths, scale: float
) -> jax.Array:
    """q [S, Hq, D], one token a row -> [S, Hq, D]; rows of 0 keys give zeros."""
    assert pool.bounds is not None
    scores = page_scores(q, pool.bounds, layer, rows.page_table, kv_lengths, page_size=pool.page_size)
    kv_heads = pool.k_pages.shape[2]
    chosen = select(policy, scores, rows.page_table, kv_lengths, kv_heads=kv_heads, scale=scale)
    lists = (chosen.page_lists, chosen.tokens)
    return page_attention(q, pool.k_pages, pool.v_pages, layer, *lists, scale=scale)


def _either(condition, then: Callable[[], jax.Array], otherwise: Callable[[], jax.Array]) -> jax.Array:
    """Known while tracing where layers are unrolled, so that only one of both is compiled."""
    if isinstance(condition, jax.core.Tracer):
        return jax.lax.cond(condition, then, otherwise)
    return then() if condition else otherwise()
