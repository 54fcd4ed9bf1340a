"""The experts on the device, and the link that brings more: part of the program, so that XLA keeps reads and writes in order."""

from __future__ import annotations

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding


def link(records: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """The host's records as an argument of programs, and as the host reads them: one and the same memory.

    On the CPU that is the mapped file. For other devices the records move to pinned memory, from where programs copy
    at the link's full rate; XLA takes at most 64 GiB of it unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says more. That this
    memory's address is the host's has not been tried on a GPU.

    Args:
      records: uint8 [N, nbytes].
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return jax.device_put(records, may_alias=True), records
    array = jax.device_put(records, SingleDeviceSharding(device, memory_kind="pinned_host"))
    memory = (ctypes.c_uint8 * records.nbytes).from_address(array.unsafe_buffer_pointer())
    return array, np.ctypeslib.as_array(memory).reshape(records.shape)


def bring(records: jax.Array, place: jax.Array) -> jax.Array:
    """One record on the device: uint8 [1, nbytes]."""
    one = jax.lax.dynamic_slice_in_dim(records, place, 1)
    return jax.device_put(one, jax.memory.Space.Device)


def fill(pool: jax.Array, records: jax.Array, moves: jax.Array, count: jax.Array) -> jax.Array:
    """Brings records to slots. moves: int32 [M, 2] of (slot, place), the first `count` of which count."""

    def move(i, pool):
        return jax.lax.dynamic_update_slice(pool, bring(records, moves[i, 1]), (moves[i, 0], 0))

    return jax.lax.fori_loop(0, count, move, pool)


fill_now = jax.jit(fill, donate_argnums=0)


def empty(slots: int, nbytes: int) -> jax.Array:
    """uint8 [slots, nbytes]"""
    return jnp.zeros((slots, nbytes), jnp.uint8)
