"""The seam: a layer's experts as one question to the host and the device's own part, inside a jitted step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.moe import Experts
from jaxinfer.offload.exchange import Exchange
from jaxinfer.offload.host_experts import ExpertError
from jaxinfer.offload.pool import bring, fill
from pallas_kernels.packed_experts import Record, packed_experts


class CallbackExperts:
    """Makes the `experts` of a forward pass.

    Each layer asks the host once which slots to use, which experts to stream, and what the host computed. Where that
    would take longer than asking twice the answer comes without it, and is fetched when the device has done its part.
    Exceptions do not pass through XLA, where they would be undefined: the first is kept until someone takes it, and the
    step goes on with zeros.

    Args:
      rows: of every layer of the model, its place among those with experts; -1 for the others.
      experts: of a layer.
      moves: most experts that one answer brings to slots.
    """

    def __init__(
        self,
        exchange: Exchange,
        record: Record,
        rows: tuple[int, ...],
        activation: str,
        experts: int,
        moves: int,
    ):
        self._exchange, self._record, self._activation = exchange, record, activation
        self._rows = np.asarray(rows, np.int32)
        self._experts, self._moves = experts, moves
        self._failure: ExpertError | None = None

    def take_failure(self) -> ExpertError | None:
        """The first failure since the last call of this."""
        failure, self._failure = self._failure, None
        return failure

    def bind(self, records: jax.Array) -> Experts:
        """For one trace, whose cache has the pool as `slots`, uint8 [S, record.nbytes].

        records: uint8 [N, record.nbytes] of all experts, an argument of the traced function.
        """

        def experts(cache: Any, layer: Any, x: jax.Array, ids: jax.Array, shares: jax.Array):
            def compute(pool: jax.Array, slots: jax.Array) -> jax.Array:
                given = (x.astype(jnp.float32), pool, slots, shares)
                return packed_experts(*given, record=self._record, activation=self._activation)

            answer = (
                jax.ShapeDtypeStruct(ids.shape, jnp.int32),
                jax.ShapeDtypeStruct((self._experts,), jnp.int32),
                jax.ShapeDtypeStruct((self._moves, 2), jnp.int32),
                jax.ShapeDtypeStruct((3,), jnp.int32),
                jax.ShapeDtypeStruct(x.shape, jnp.float32),
            )
            row = jnp.asarray(self._rows)[layer]
            asked = jax.pure_callback(self._ask, answer, row, x, ids, shares, vmap_method="sequential")
            slots, stream, moves, (streamed, moved, later), partial = asked
            total = compute(cache.slots, slots)
            brought = _Stream(records, row * self._experts, stream, ids, compute)
            total = jax.lax.cond(streamed > 0, brought.add, lambda count, total: total, streamed, total)
            # No slot is written before all are read: the bound says nothing but that it waits for the sum.
            moved = jnp.minimum(moved, self._moves + (total[0, 0] > 0))
            pool = fill(cache.slots, records, moves, moved)
            partial = jax.lax.cond(
                later > 0,
                lambda *done: jax.pure_callback(self._collect, answer[-1], *done, vmap_method="sequential"),
                lambda *done: partial,
                *(total[0, 0], pool[0, 0]),  # both are there before the device waits for the host
            )
            return (total + partial).astype(x.dtype), cache._replace(slots=pool)

        return experts

    def _ask(self, row, x, ids, shares):
        x, ids, shares = np.asarray(x), np.asarray(ids), np.asarray(shares)
        self._zeros = np.zeros(x.shape, np.float32)
        stream, moves = np.zeros(self._experts, np.int32), np.zeros((self._moves, 2), np.int32)
        try:
            answer = self._exchange.answer(int(row), x, ids, shares)
        except ExpertError as error:
            self._failure = self._failure or error
            return np.full(ids.shape, -1, np.int32), stream, moves, np.zeros(3, np.int32), self._zeros
        stream[: len(answer.stream)] = answer.stream
        for number, move in enumerate(answer.moves):
            moves[number] = move
        counts = np.array([len(answer.stream), len(answer.moves), answer.later], np.int32)
        return answer.slots, stream, moves, counts, self._zeros if answer.later else self._collect()

    def _collect(self, *done):
        del done
        try:
            return self._exchange.collect(self._zeros.shape)
        except ExpertError as error:
            self._failure = self._failure or error
        return self._zeros


class _Stream:
    """What the experts that are streamed compute. Each comes while the one before is computed with, if XLA copies aside."""

    def __init__(
        self, records: jax.Array, first: jax.Array, stream: jax.Array, ids: jax.Array, compute: Callable
    ):
        self.records, self.first, self.stream, self.ids, self.compute = records, first, stream, ids, compute

    def bring(self, number: jax.Array | int) -> jax.Array:
        return bring(self.records, self.first + self.stream[number])

    def one(self, number: jax.Array, record: jax.Array) -> jax.Array:
        return self.compute(record, jnp.where(self.ids == self.stream[number], 0, -1))

    def add(self, count: jax.Array, total: jax.Array) -> jax.Array:
        """`total` and the work of the first `count` > 0 of the stream."""

        def step(number, carry):
            total, record = carry
            return total + self.one(number, record), self.bring(number + 1)

        total, record = jax.lax.fori_loop(0, count - 1, step, (total, self.bring(0)))
        return total + self.one(count - 1, record)
