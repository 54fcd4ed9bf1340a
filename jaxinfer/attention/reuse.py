"""A choice of pages that serves for several steps (as in LServe, arXiv 2502.14866, section 3.4): consecutive tokens ask for much the same.

Whether a row chooses anew depends on its own position alone, so neither its batch mates nor how steps are grouped into
calls change what it attends to. Rows that do not are padding to the kernels that score and choose.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.attention.quest import QuestPolicy, Selection, choose, listed, pages_of
from pallas_kernels.page_bounds import Bounds


class Chosen(NamedTuple):
    """What rows chose last, as in Selection: positions int32 [..., H, W], number int32 [..., H]."""

    positions: jax.Array
    number: jax.Array

    def at(self, layer: jax.Array | int, slots: jax.Array) -> Chosen:
        """Of [L, slots, ...] what the rows of one layer chose."""
        return Chosen(self.positions[layer, slots], self.number[layer, slots])

    def with_rows(self, layer: jax.Array | int, slots: jax.Array, rows: Chosen) -> Chosen:
        """Of [L, slots, ...] with the rows of one layer replaced; a slot past the last is dropped."""
        return Chosen(*(a.at[layer, slots].set(b, mode="drop") for a, b in zip(self, rows)))


def remember(policy: QuestPolicy, shape: tuple[int, int, int], table_width: int) -> Chosen | None:
    """Room for the choices of [layers, slots, choosing heads]; None where every choice serves once."""
    if policy.reuse_steps == 1:
        return None
    positions = jnp.zeros((*shape, policy.width(table_width)), jnp.int32)
    return Chosen(positions, jnp.zeros(shape, jnp.int32))


def chooses_anew(policy: QuestPolicy, kv_len: jax.Array, sparse_from: jax.Array) -> jax.Array:
    """Whether the last of kv_len tokens makes a choice of its own: the first that may choose, and every n-th from there."""
    since = kv_len - 1 - sparse_from
    return (since >= 0) & (since % policy.reuse_steps == 0)


def choose_or_reuse(
    policy: QuestPolicy,
    before: Chosen,
    anew: jax.Array,
    q: jax.Array,
    bounds: Bounds,
    layer: jax.Array | int,
    page_table: jax.Array,
    kv_len: jax.Array,
    *,
    scale: float,
) -> tuple[Selection, Chosen]:
    """As `quest.choose` for the rows where `anew` (bool [S]); the others take `before` again, with the last pages of today.

    Returns the selection and what to remember of it.
    """
    fresh = choose(policy, q, bounds, layer, page_table, jnp.where(anew, kv_len, 0), scale=scale)
    now = Chosen(
        jnp.where(anew[:, None, None], fresh.positions, before.positions),
        jnp.where(anew[:, None], fresh.number, before.number),
    )
    return select_again(policy, now, page_table, kv_len), now


def select_again(policy: QuestPolicy, before: Chosen, page_table: jax.Array, kv_len: jax.Array) -> Selection:
    """An earlier choice for rows that have grown by fewer than reuse_steps tokens; the last pages move along."""
    pages, last = pages_of(kv_len, policy.page_size)[:, None], policy.last_pages
    dense = kv_len[:, None] <= policy.dense_tokens
    count = jnp.where(dense, pages, before.number)
    slot, moving = jnp.arange(before.positions.shape[2]), (count - last)[..., None]
    positions = jnp.where(slot < moving, before.positions, pages[..., None] - last + slot - moving)
    positions = jnp.where(dense[..., None], slot, positions)
    return listed(policy, jnp.clip(positions, 0, page_table.shape[1] - 1), count, page_table, kv_len)
