"""The seam: a layer's experts as one host callback and one call on the device, inside a jitted step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.moe import Experts
from jaxinfer.offload.exchange import Exchange
from jaxinfer.offload.host_experts import ExpertError
from pallas_kernels.packed_experts import Record, packed_experts


class CallbackExperts:
    """Makes the `experts` of a forward pass.

    Each layer asks the host once which slots to use and what it computed; where more experts have to be streamed than
    land at once it asks again. Exceptions do not pass through XLA, where they would be undefined: the first is kept until
    someone takes it, and the step goes on with zeros.

    Args:
      rows: of every layer of the model, its place among those with experts; -1 for the others.
    """

    def __init__(self, exchange: Exchange, record: Record, rows: tuple[int, ...], activation: str):
        self._exchange, self._record, self._activation = exchange, record, activation
        self._rows = np.asarray(rows, np.int32)
        self._failure: ExpertError | None = None

    def take_failure(self) -> ExpertError | None:
        """The first failure since the last call of this."""
        failure, self._failure = self._failure, None
        return failure

    def bind(self, pool: jax.Array) -> Experts:
        """For one trace. pool: uint8 [S, record.nbytes], an argument of the traced function."""

        def experts(layer: Any, x: jax.Array, ids: jax.Array, shares: jax.Array) -> jax.Array:
            answer = (
                jax.ShapeDtypeStruct(ids.shape, jnp.int32),
                jax.ShapeDtypeStruct(x.shape, jnp.float32),
                jax.ShapeDtypeStruct((), jnp.int32),
            )
            row = jnp.asarray(self._rows)[layer]

            def one_round(carry):
                total, number, _ = carry
                # the sum so far goes in so that the host is asked only when the slots of the round before are read
                args = (row, number, total[0, 0], x, ids, shares)
                slots, partial, more = jax.pure_callback(self._ask, answer, *args, vmap_method="sequential")
                on_device = packed_experts(
                    x.astype(jnp.float32),
                    pool,
                    slots,
                    shares,
                    record=self._record,
                    activation=self._activation,
                )
                return total + (partial + on_device), number + 1, more

            begin = (jnp.zeros(x.shape, jnp.float32), jnp.int32(0), jnp.int32(1))
            total, _, _ = jax.lax.while_loop(lambda carry: carry[2] > 0, one_round, begin)
            return total.astype(x.dtype)

        return experts

    def _ask(self, row, number, after, x, ids, shares):
        del after
        x, ids, shares = np.asarray(x), np.asarray(ids), np.asarray(shares)
        try:
            answer = self._exchange.answer(int(row), int(number), x, ids, shares)
            return answer.slots, answer.partial, np.int32(answer.more)
        except ExpertError as error:
            self._failure = self._failure or error
        return np.full(ids.shape, -1, np.int32), np.zeros(x.shape, np.float32), np.int32(0)
