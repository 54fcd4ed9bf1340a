"""Attention over the pool's pages: what a step's tokens see, everything or the pages that Quest chooses."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.attention import Chosen, QuestPolicy, choose, choose_or_reuse, chooses_anew
from jaxinfer.engine.nano import Beside, attend_in_two
from jaxinfer.kvcache.pool import KVPool
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Attend, ByLayer
from jaxinfer.models.nano import NanoBatches
from jaxinfer.schedule.step_times import StepShape, Way
from jaxinfer.split import ALL_HEADS, HeadSplit
from pallas_kernels.hybrid_attention import hybrid_attention
from pallas_kernels.kv_write import kv_write
from pallas_kernels.packed_pages import PackedPages, pack, unpack
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_bounds import page_bounds
from pallas_kernels.ragged_attention import ragged_attention

# Between dense and sparse layers, from the first to the last. With more of them each layer chooses as it runs.
MOST_CHANGES = 2
IN_ONE = StepShape(Way.WHOLE, 0)


Attended = jax.Array | tuple[jax.Array, Beside]


class PagedCache(NamedTuple):
    """What goes through the layers: the pool, the choices that serve again, and the slots of experts (see `State`)."""

    pool: KVPool
    chosen: Chosen | None = None
    slots: jax.Array | None = None


class PagedRows(NamedTuple):
    """The rows of a step. int32 [S] each but for page_table [S, P].

    Attributes:
      starts, counts: row s owns the flat tokens [starts[s], starts[s] + counts[s]); 0 tokens is a padding row.
      kv_lengths: keys of the row once this step is written.
      single: 1 where the row's one token takes the attention of decoding; under a policy it chooses its pages.
      slots: of the device's per-sequence state.
      sparse_from: tokens from this one on choose the pages they attend to.
    """

    page_table: jax.Array
    starts: jax.Array
    counts: jax.Array
    kv_lengths: jax.Array
    single: jax.Array
    slots: jax.Array
    sparse_from: jax.Array


def paged_attention(
    config: ModelConfig, policy: QuestPolicy | None, rows: PagedRows, kv_slots: jax.Array, *, mixed: bool,
    shape: StepShape = IN_ONE, heads: HeadSplit = ALL_HEADS,
) -> Attend | NanoBatches | ByLayer:  # fmt: skip
    """The attention of a forward pass over flat tokens [T]: writes their keys and values, then attends.

    Args:
      policy: how single rows choose their pages; None lets every row attend to all its keys.
      kv_slots: int32 [T], page * page_size + offset; negative for padding.
      mixed: whether rows that are not single may be among them.
      shape: of a mixed step, which says how the attention of single rows and of the others go together; of a split one the
        first nano-batch holds the single rows' tokens.
      heads: those that this device has.
    """
    scale = 1 / math.sqrt(config.head_dim)
    single = (rows.single > 0) & (rows.counts > 0)
    lengths = jnp.where(single, rows.kv_lengths, 0)
    anew = single if policy is None else single & chooses_anew(policy, lengths, rows.sparse_from)

    def attend(dense: bool | None, cache: PagedCache, layer, q, k, v, window):
        pool = _write(cache.pool, layer, k, v, kv_slots)

        def ragged(counts: jax.Array) -> jax.Array:
            of_rows = (rows.page_table, rows.starts, counts, rows.kv_lengths)
            return ragged_attention(
                q, pool.k_pages, pool.v_pages, layer, *of_rows, scale=scale, window=window
            )

        def with_singles(page_lists: jax.Array, tokens: jax.Array) -> Attended:
            pages = (pool.k_pages, pool.v_pages, layer)
            of_rows = (rows.page_table, rows.starts, rows.counts, rows.kv_lengths)
            if shape.first:
                return attend_in_two(shape, q, pages, single, of_rows, (page_lists, tokens), scale)
            if mixed:
                implementation = None if shape.way is Way.ATTENTION else "xla"
                settings = {"scale": scale, "window": window, "implementation": implementation}
                return hybrid_attention(q, *pages, *of_rows, single, page_lists, tokens, **settings)
            singles = page_attention(q[rows.starts], *pages, page_lists, tokens, scale=scale)
            return jnp.zeros_like(q).at[jnp.where(single, rows.starts, q.shape[0])].set(singles, mode="drop")

        def to_all() -> Attended:
            if shape.first or _decodes_apart(config):
                return with_singles(rows.page_table[:, None], lengths[:, None])
            return ragged(rows.counts)

        def to_chosen() -> tuple[Attended, Chosen | None]:
            assert policy is not None and pool.bounds is not None
            asking = q[rows.starts]
            if policy.mode == "shared":  # the query heads of a KV head choose together, wherever they are
                asking = heads.of_group(asking)
            given = (asking, pool.bounds, layer, rows.page_table, lengths)
            if before is None:
                selection, now = choose(policy, *given, scale=scale), None
            else:
                selection, now = choose_or_reuse(policy, before, anew, *given, scale=scale)
            return with_singles(selection.page_lists, selection.tokens), now

        if policy is None:
            return to_all(), cache._replace(pool=pool)
        before = None if cache.chosen is None else cache.chosen.at(layer, rows.slots)
        if dense is None:
            dense = (layer < policy.dense_layers) | (window > 0)
        out, now = _either(dense, lambda: (to_all(), before), to_chosen)
        if cache.chosen is None or now is None:
            return out, cache._replace(pool=pool)
        slots = jnp.where(anew, rows.slots, cache.chosen.number.shape[1])
        return out, cache._replace(pool=pool, chosen=cache.chosen.with_rows(layer, slots, now))

    def made(dense: bool | None) -> Attend | NanoBatches:
        own = functools.partial(attend, dense)
        return NanoBatches(shape.first, own) if shape.first else own

    if policy is None:
        return made(None)
    dense = [layer < policy.dense_layers or window > 0 for layer, window in enumerate(config.windows)]
    if sum(a != b for a, b in itertools.pairwise(dense)) > MOST_CHANGES:
        return made(None)
    kinds = {kind: made(kind) for kind in (False, True)}
    return ByLayer(tuple(kinds[kind] for kind in dense))


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


def _either[Out](condition, then: Callable[[], Out], otherwise: Callable[[], Out]) -> Out:
    """Where the condition is known while tracing only one of both is compiled."""
    if isinstance(condition, jax.core.Tracer):
        return jax.lax.cond(condition, then, otherwise)
    return then() if condition else otherwise()
