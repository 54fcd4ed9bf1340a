"""The jitted programs: one mixed step, several decode steps, and setting the state of a slot."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.core import MAX_TOP_LOGPROBS
from jaxinfer.engine.batch import TOKEN_FROM_SLOT, Batch, Knobs, Needs, Rows, Tokens
from jaxinfer.engine.sampler import Sampled, SlotTable, sample
from jaxinfer.kvcache.pool import KVPool
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import forward, logits
from jaxinfer.models.layers import Decoder
from pallas_kernels.kv_write import kv_write
from pallas_kernels.ragged_attention import ragged_attention

SCORE_BLOCK = 64  # tokens whose logits over the whole vocabulary are held at once when scoring


class State(NamedTuple):
    """What the device keeps between calls; donated to each."""

    pool: KVPool
    table: SlotTable


class Programs:
    """Jitted functions of (weights, state, batch). `compilations` counts how often one was traced for new shapes.

    The model goes in as a flat list of arrays: flattening modules costs more per call than a decode step may.
    """

    def __init__(self, model: Decoder, config: ModelConfig, decode_steps: int):
        self.weights, self._tree = jax.tree.flatten(model)
        self.config = config
        self.decode_steps = decode_steps
        self.compilations = 0
        self.mixed = jax.jit(self._mixed, donate_argnums=1)
        self.decode = jax.jit(self._decode, donate_argnums=1)
        self.score = jax.jit(self._score, donate_argnums=1)
        self.set_slot = jax.jit(self._set_slot, donate_argnums=0)

    def _mixed(self, weights: list[jax.Array], state: State, batch: Batch) -> tuple[State, Sampled]:
        """Chunks and decoding rows together; one new token per row, as Sampled with a step axis of one."""
        state, sampled, _ = self._run_mixed(self._model(weights), state, batch)
        return state, sampled

    def _score(
        self, weights: list[jax.Array], state: State, batch: Batch
    ) -> tuple[State, Sampled, jax.Array]:
        """As `_mixed`, and the log-probability of every token's target: float32 [T]."""
        model = self._model(weights)
        state, sampled, hidden = self._run_mixed(model, state, batch)

        def target_logprob(token):
            hidden, target = token
            return jax.nn.log_softmax(logits(model, self.config, hidden[None])[0])[target]

        targets = Tokens(*batch.tokens).targets
        block = min(SCORE_BLOCK, len(targets))
        return state, sampled, jax.lax.map(target_logprob, (hidden, targets), batch_size=block)

    def _decode(
        self, weights: list[jax.Array], state: State, batch: Batch, steps: jax.Array
    ) -> tuple[State, Sampled]:
        """`steps` (at most decode_steps) tokens per row, fed back on the device: Sampled with a leading step axis."""
        model = self._model(weights)
        rows = Rows(*batch.rows)
        size = rows.slots.shape[0]

        def step(i, carry):
            state, out = carry
            active = i < rows.counts
            positions = rows.kv_lengths + i
            ids = state.table.last_tokens[rows.slots]
            attend = self._attend(
                batch.page_table,
                jnp.arange(size, dtype=jnp.int32),
                active.astype(jnp.int32),
                positions + 1,
                jnp.where(active, self._kv_slots(state.pool, batch.page_table, positions), -1),
            )
            rope_lengths = jnp.maximum(rows.rope_floors, positions + 1)
            hidden, pool = forward(
                model, self.config, ids, positions, rope_lengths, attend, state.pool, active
            )
            state, sampled = self._sample(model, hidden, pool, state.table, batch, positions + 1, active)
            return state, jax.tree.map(lambda all_, new: all_.at[i].set(new), out, sampled)

        return jax.lax.fori_loop(0, steps, step, (state, self._empty_samples(size)))

    def _empty_samples(self, size: int) -> Sampled:
        lead = (self.decode_steps, size)
        top = (*lead, MAX_TOP_LOGPROBS)
        return Sampled(jnp.zeros(lead, jnp.int32), jnp.zeros(lead), jnp.zeros(top, jnp.int32), jnp.zeros(top))

    def _set_slot(self, table: SlotTable, slot, history, bias_ids, bias_values, banned_ids) -> SlotTable:
        self.compilations += 1
        return table._replace(
            history=table.history.at[slot].set(history),
            bias_ids=table.bias_ids.at[slot].set(bias_ids),
            bias_values=table.bias_values.at[slot].set(bias_values),
            banned_ids=table.banned_ids.at[slot].set(banned_ids),
        )

    def _model(self, weights: list[jax.Array]) -> Decoder:
        self.compilations += 1  # runs once per trace
        return jax.tree.unflatten(self._tree, weights)

    def _run_mixed(self, model: Decoder, state: State, batch: Batch) -> tuple[State, Sampled, jax.Array]:
        tokens, rows = Tokens(*batch.tokens), Rows(*batch.rows)
        ids = jnp.where(tokens.ids == TOKEN_FROM_SLOT, state.table.last_tokens[tokens.slots], tokens.ids)
        attend = self._attend(batch.page_table, rows.starts, rows.counts, rows.kv_lengths, tokens.kv_slots)
        valid = tokens.kv_slots >= 0
        hidden, pool = forward(
            model, self.config, ids, tokens.positions, tokens.rope_lengths, attend, state.pool, valid
        )
        last = hidden[jnp.maximum(rows.starts + rows.counts - 1, 0)]
        wanted = rows.samples > 0
        state, sampled = self._sample(model, last, pool, state.table, batch, rows.kv_lengths, wanted)
        return state, jax.tree.map(lambda new: new[None], sampled), hidden

    def _attend(self, page_table, starts, counts, kv_lengths, kv_slots):
        scale = 1 / math.sqrt(self.config.head_dim)

        def attend(pool: KVPool, layer, q, k, v, window):
            pool = KVPool(*kv_write(pool.k_pages, pool.v_pages, layer, k, v, kv_slots))
            out = ragged_attention(
                q,
                pool.k_pages,
                pool.v_pages,
                layer,
                page_table,
                starts,
                counts,
                kv_lengths,
                scale=scale,
                window=window,
            )
            return out, pool

        return attend

    def _kv_slots(self, pool: KVPool, page_table: jax.Array, positions: jax.Array) -> jax.Array:
        size = pool.k_pages.shape[3]
        pages = jnp.take_along_axis(page_table, positions[:, None] // size, axis=1, mode="clip")[:, 0]
        return pages * size + positions % size

    def _sample(self, model, hidden, pool, table, batch, lengths, wanted) -> tuple[State, Sampled]:
        """Sample a token after each row's first `lengths` tokens and, where `wanted`, make it the slot's next input."""
        rows = Rows(*batch.rows)
        scores = logits(model, self.config, hidden)
        sampled = sample(scores, lengths, rows, Knobs(*batch.knobs), Needs(*batch.needs), table)
        slots = jnp.where(wanted, rows.slots, table.last_tokens.shape[0] - 1)
        table = table._replace(
            last_tokens=table.last_tokens.at[slots].set(sampled.tokens),
            history=table.history.at[slots, lengths].set(sampled.tokens, mode="drop"),
        )
        return State(pool, table), sampled
