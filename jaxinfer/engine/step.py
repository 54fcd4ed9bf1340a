"""The jitted programs: one mixed step, several decode steps, and setting the state of a slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp

from jaxinfer.attention import Chosen, QuestPolicy
from jaxinfer.engine.batch import TOKEN_FROM_SLOT, Batch, Knobs, Needs, Rows, Tokens
from jaxinfer.engine.paged import IN_ONE, PagedCache, PagedRows, paged_attention
from jaxinfer.engine.sampler import Sampled, SlotTable, logprobs_of, sample
from jaxinfer.engine.spread import ONE_DEVICE, Spread
from jaxinfer.kvcache.pool import KVPool
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import forward, logits
from jaxinfer.models.layers import Decoder
from jaxinfer.models.moe import Experts
from jaxinfer.offload.offload import Offload
from jaxinfer.schedule.step_times import StepShape

_CONCURRENT = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
SCORE_BLOCK = 64  # tokens whose logits over the whole vocabulary are held at once when scoring


class State(NamedTuple):
    """What the device keeps between calls; donated to each.

    `chosen`: the pages that every layer and slot chose last; None where no choice serves again.
    `slots`: uint8 [S, bytes of an expert], the experts on the device; None where the model holds them.
    """

    pool: KVPool
    table: SlotTable
    chosen: Chosen | None = None
    slots: jax.Array | None = None

    @property
    def cache(self) -> PagedCache:
        return PagedCache(self.pool, self.chosen, self.slots)


@dataclass(frozen=True)
class StepSpec:
    """What the programs are compiled for, beside the shapes of their arguments. Equal specs share compiled programs.

    Attributes:
      config: of the model as one device sees it.
      tree: structure of the model and of its experts' records on the host (None where the model holds them). Their
        arrays go in as a flat list: flattening modules at every call costs more than a small step does.
      decode_steps: most steps of a decode call.
      quest: how decoding tokens choose the pages they attend to; None for all.
      offload: computes the experts that are not part of the model.
      spread, layout: how the model lies on devices, and the arrays of its weights on them.
    """

    config: ModelConfig
    tree: jax.tree_util.PyTreeDef
    decode_steps: int
    quest: QuestPolicy | None = None
    offload: Offload | None = None
    spread: Spread = ONE_DEVICE
    layout: tuple[Any, ...] = ()

    def model(self, weights: list[jax.Array]) -> Decoder:
        return jax.tree.unflatten(self.tree, weights)[0]

    def experts(self, weights: list[jax.Array]) -> Experts | None:
        """Who computes the experts of a forward pass."""
        return None if self.offload is None else self.offload.bind(jax.tree.unflatten(self.tree, weights)[1])


class Programs:
    """The jitted steps of one spec: `mixed`, `score` and `decode` take (weights, state, batch, ...) and donate the state;
    the static `top` is how many of the likeliest tokens they report where a row asks for them. The `steps` of `decode` are
    static where they are given by name. `mixed` takes a static `shape` as well, see `mixed_step`; `chains` is `mixed` for those
    whose independent parts a GPU may run at once.

    Engines of equal specs share them (`Programs.of`). They live as long as one of those engines does: compiled code
    takes a few hundred memory maps a program, and the kernel grants a process some ten thousand.
    """

    _shared: ClassVar[WeakValueDictionary[StepSpec, Programs]] = WeakValueDictionary()

    def __init__(self, spec: StepSpec):
        self._traced: list[str] = []
        self.mixed = _jit(mixed_step, spec, self._traced)
        self.chains = _jit(mixed_step, spec, self._traced, _CONCURRENT)
        self.score = _jit(score_step, spec, self._traced)
        self.decode = _jit(decode_steps, spec, self._traced)

    @property
    def compilations(self) -> int:
        """How often a program was traced for new shapes, and so compiled or taken from the persistent cache."""
        return len(self._traced)

    @classmethod
    def of(cls, spec: StepSpec) -> Programs:
        programs = cls._shared.get(spec)
        if programs is None:
            programs = cls._shared[spec] = cls(spec)
        return programs


def _jit(
    step: Callable, spec: StepSpec, traced: list[str], options: Mapping[str, Any] | None = None
) -> Callable:
    def run(weights: list[jax.Array], state: State, *batch, **static: Any):
        traced.append(step.__name__)  # runs while tracing, never in a compiled call

        def share(weights: list[jax.Array], state: State, *batch):
            state, *results = step(spec, weights, state, *batch, **static)
            return state, results

        state, results = spec.spread.program(share, spec.layout)(weights, state, *batch)
        return state, *results

    static = ("top", "steps", "shape")
    given = None if options is None or jax.default_backend() != "gpu" else dict(options)
    return jax.jit(run, donate_argnums=1, static_argnames=static, compiler_options=given)


def mixed_step(
    spec: StepSpec, weights: list[jax.Array], state: State, batch: Batch, top: int, shape: StepShape = IN_ONE
) -> tuple[State, Sampled]:
    """Chunks and decoding rows together; one new token per row, as Sampled with a step axis of one. The batch is laid out for
    `shape`."""
    state, sampled, _ = _run_mixed(spec, weights, state, batch, top, shape)
    return state, sampled


def score_step(
    spec: StepSpec, weights: list[jax.Array], state: State, batch: Batch, top: int
) -> tuple[State, Sampled, jax.Array]:
    """As `mixed_step`, and the log-probability of every token's target: float32 [T]."""
    model = spec.model(weights)
    state, sampled, hidden = _run_mixed(spec, weights, state, batch, top, IN_ONE)

    def target_logprobs(block):
        hidden, targets = block
        return logprobs_of(logits(model, spec.config, hidden), targets, spec.spread.vocabulary)

    targets = Tokens(*batch.tokens).targets
    count = len(targets)
    size = min(SCORE_BLOCK, count)
    blocks = [jnp.pad(x, ((0, -count % size), *((0, 0),) * (x.ndim - 1))) for x in (hidden, targets)]
    scores = jax.lax.map(target_logprobs, tuple(x.reshape(-1, size, *x.shape[1:]) for x in blocks))
    return state, sampled, scores.reshape(-1)[:count]


def decode_steps(
    spec: StepSpec, weights: list[jax.Array], state: State, batch: Batch, steps: jax.Array | int, top: int
) -> tuple[State, Sampled]:
    """`steps` tokens per row, fed back on the device: Sampled with a leading axis of spec.decode_steps."""
    model, experts = spec.model(weights), spec.experts(weights)
    rows = Rows(*batch.rows)
    size = rows.slots.shape[0]

    def step(i, carry):
        state, out = carry
        active = i < rows.counts
        positions = rows.kv_lengths + i
        kv_slots = jnp.where(active, _kv_slots(state.pool, batch.page_table, positions), -1)
        starts, counts = jnp.arange(size, dtype=jnp.int32), active.astype(jnp.int32)
        paged = PagedRows(
            batch.page_table, starts, counts, positions + 1, counts, rows.slots, rows.sparse_from
        )
        attend = paged_attention(
            spec.config, spec.quest, paged, kv_slots, mixed=False, heads=spec.spread.heads
        )
        ids = state.table.last_tokens[rows.slots]
        rope_lengths = jnp.maximum(rows.rope_floors, positions + 1)
        given = (ids, positions, rope_lengths, attend, state.cache, active, experts)
        hidden, cache = forward(model, spec.config, *given)
        lengths = positions + 1
        state, sampled = _sample(spec, model, hidden, cache, state.table, batch, lengths, active, top)
        return state, jax.tree.map(lambda every, new: every.at[i].set(new), out, sampled)

    return jax.lax.fori_loop(0, steps, step, (state, _no_samples(spec.decode_steps, size, top)))


@partial(jax.jit, donate_argnums=0)
def set_slot(table: SlotTable, slot, history, bias_ids, bias_values, banned_ids) -> SlotTable:
    """Bring to a slot what the penalties, biases and minimum length of its sequence need."""
    return table._replace(
        history=table.history.at[slot].set(history),
        bias_ids=table.bias_ids.at[slot].set(bias_ids),
        bias_values=table.bias_values.at[slot].set(bias_values),
        banned_ids=table.banned_ids.at[slot].set(banned_ids),
    )


@partial(jax.jit, donate_argnums=0)
def copy_pages(pool: KVPool, pages: jax.Array) -> KVPool:
    """Copy pages of all layers with their bounds. pages: int32 [2, C], from and to; padding goes to pages past the last. All are
    read before one is written."""
    source, target = pages
    return jax.tree.map(lambda leaf: leaf.at[:, target].set(leaf[:, source], mode="drop"), pool)


@partial(jax.jit, donate_argnums=0)
def set_beams(carried: tuple[SlotTable, Chosen | None], beams: jax.Array) -> tuple[SlotTable, Chosen | None]:
    """Give beams the token that the host chose and what their parents' slots hold beside it.

    beams: int32 [3, C], the slot it goes on from, its own slot, its token; padding has slots past the last.
    """
    table, chosen = carried
    source, slot, token = beams
    table = table._replace(last_tokens=table.last_tokens.at[slot].set(token, mode="drop"))
    return table, jax.tree.map(lambda leaf: leaf.at[:, slot].set(leaf[:, source], mode="drop"), chosen)


def _run_mixed(
    spec: StepSpec, weights: list[jax.Array], state: State, batch: Batch, top: int, shape: StepShape
) -> tuple[State, Sampled, jax.Array]:
    model = spec.model(weights)
    tokens, rows = Tokens(*batch.tokens), Rows(*batch.rows)
    ids = jnp.where(tokens.ids == TOKEN_FROM_SLOT, state.table.last_tokens[tokens.slots], tokens.ids)
    of_rows = (rows.starts, rows.counts, rows.kv_lengths, rows.single, rows.slots, rows.sparse_from)
    paged = PagedRows(batch.page_table, *of_rows)
    attend = paged_attention(
        spec.config,
        spec.quest,
        paged,
        tokens.kv_slots,
        mixed=True,
        shape=shape,
        heads=spec.spread.heads,
    )
    valid = tokens.kv_slots >= 0
    given = (ids, tokens.positions, tokens.rope_lengths, attend, state.cache, valid, spec.experts(weights))
    hidden, cache = forward(model, spec.config, *given)
    last = hidden[jnp.maximum(rows.starts + rows.counts - 1, 0)]
    wanted = rows.samples > 0
    state, sampled = _sample(spec, model, last, cache, state.table, batch, rows.kv_lengths, wanted, top)
    return state, jax.tree.map(lambda new: new[None], sampled), hidden


def _sample(
    spec: StepSpec,
    model: Decoder,
    hidden,
    cache: PagedCache,
    table: SlotTable,
    batch: Batch,
    lengths,
    wanted,
    top: int,
) -> tuple[State, Sampled]:
    """Sample a token after each row's first `lengths` tokens and, where `wanted`, make it the slot's next input."""
    rows = Rows(*batch.rows)
    needs = None if batch.needs is None else Needs(*batch.needs)
    scores = logits(model, spec.config, hidden)
    given = (scores, lengths, rows, Knobs(*batch.knobs), needs, table, top)
    sampled = sample(*given, spec.spread.vocabulary)
    slots = jnp.where(wanted, rows.slots, table.last_tokens.shape[0] - 1)
    table = table._replace(
        last_tokens=table.last_tokens.at[slots].set(sampled.tokens),
        history=table.history.at[slots, lengths].set(sampled.tokens, mode="drop"),
    )
    return State(cache.pool, table, cache.chosen, cache.slots), sampled


def _kv_slots(pool: KVPool, page_table: jax.Array, positions: jax.Array) -> jax.Array:
    size = pool.page_size
    pages = jnp.take_along_axis(page_table, positions[:, None] // size, axis=1, mode="clip")[:, 0]
    return pages * size + positions % size


def _no_samples(steps: int, size: int, top: int) -> Sampled:
    shape = (steps, size, top)
    ids, values = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
    return Sampled(ids[..., 0], values[..., 0], ids, values)
