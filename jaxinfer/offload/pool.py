"""The experts on the device: slots of one array, and the link that fills them."""

from __future__ import annotations

import ctypes

import jax
import jax.numpy as jnp
import numpy as np


class SlotPool:
    """Attributes:
    array: uint8 [S, nbytes], a record in each slot.
    streams: whether the link can fill a slot while a step runs.
    """

    def __init__(self, slots: int, nbytes: int):
        self.nbytes = nbytes
        self.array = jax.block_until_ready(jnp.zeros((slots, nbytes), jnp.uint8))
        self.streams = next(iter(self.array.devices())).platform == "cpu"

    def fill(self, slots: list[int], records: list[np.ndarray]) -> None:
        """Before the first step: the residents."""
        if self.streams:
            for slot, record in zip(slots, records, strict=True):
                self.write(slot, record)
            return
        for slot, record in zip(slots, records, strict=True):
            self.array = _put(self.array, jnp.asarray(record), np.int32(slot))
        jax.block_until_ready(self.array)

    def write(self, slot: int, record: np.ndarray) -> None:
        """Copies a record into the array's own memory, while a program that has it as an argument may run.

        Whoever calls has to know that nobody reads the slot, and that those who will read it wait for the return: the
        program learns the slot's number from a callback that returns later.
        """
        assert self.streams and record.nbytes == self.nbytes
        target = self.array.unsafe_buffer_pointer() + slot * self.nbytes
        ctypes.memmove(target, record.ctypes.data, self.nbytes)


@jax.jit(donate_argnums=0)
def _put(array: jax.Array, record: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, record[None], (slot, np.int32(0)))
