"""Measures a machine profile on the device at hand, in about a second."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer.schedule.profile import Joint, MachineProfile

_WIDTH = 1024
_TOKENS = (64, 256, 1024)
_KEYS = 1 << 15
_HEADS, _CHANNELS = 8, 64


def measure(dtype: str) -> MachineProfile:
    """Matrix products by token count, attention of one query per head over a long context, and both in one program."""
    weights = jnp.ones((_WIDTH, 4 * _WIDTH), dtype)
    keys = jnp.ones((_HEADS, _KEYS, _CHANNELS), dtype)
    query = jnp.ones((_HEADS, _CHANNELS), dtype)
    read = _seconds(jax.jit(_attend), query, keys)
    rates, points = [], []
    for tokens in _TOKENS:
        rows = jnp.ones((tokens, _WIDTH), dtype)
        alone = _seconds(jax.jit(jnp.matmul), rows, weights)
        together = _seconds(jax.jit(lambda r, w, q, k: (r @ w, _attend(q, k))), rows, weights, query, keys)
        rates.append(2 * rows.size * weights.shape[1] / alone)
        points.append((alone, read, min(max(together, alone, read), alone + read)))
    host = jnp.zeros(1 << 22, jnp.uint8)
    link = host.nbytes / _seconds(functools.partial(jax.device_put, device=jax.devices()[0]), _host(host))
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = float(stats.get("bytes_limit", 0)) or float("inf")
    return MachineProfile(
        flops=max(rates), bandwidth=2 * keys.nbytes / read, link=link, memory=memory, joint=Joint.fit(points)
    )


def _attend(query: jax.Array, keys: jax.Array) -> jax.Array:
    """[heads, channels]; the keys stand for the values too, so they are read twice."""
    scores = jnp.einsum("hd,hkd->hk", query, keys)
    return jnp.einsum("hk,hkd->hd", jax.nn.softmax(scores), keys)


def _host(array: jax.Array):
    import numpy as np

    return np.asarray(array)


def _seconds(call: Callable, *given, repeats: int = 5) -> float:
    """The fastest of several calls, after one to compile."""
    jax.block_until_ready(call(*given))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(*given))
        taken.append(time.perf_counter() - start)
    return min(taken)
