"""Measures a machine profile on the device at hand, in about a second."""

from __future__ import annotations

import functools
import math
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
    attend, multiply = jax.jit(_attend), jax.jit(jnp.matmul)
    both = jax.jit(lambda r, w, q, k: (r @ w, _attend(q, k)))
    rates, reads, points = [], [], []
    for tokens in _TOKENS:
        rows = jnp.ones((tokens, _WIDTH), dtype)
        alone, read, together = _seconds(
            functools.partial(multiply, rows, weights),
            functools.partial(attend, query, keys),
            functools.partial(both, rows, weights, query, keys),
        )
        rates.append(2 * rows.size * weights.shape[1] / alone)
        reads.append(read)
        points.append((alone, read, min(max(together, alone, read), alone + read)))
    read = min(reads)
    host = jnp.zeros(1 << 22, jnp.uint8)
    (brought,) = _seconds(functools.partial(jax.device_put, _host(host), device=jax.devices()[0]))
    link = host.nbytes / brought
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


def _seconds(*calls: Callable, repeats: int = 7) -> list[float]:
    """The fastest of several of each, after one to compile; in turn, so that what else the machine does hits all alike."""
    for call in calls:
        jax.block_until_ready(call())
    taken = [math.inf] * len(calls)
    for _ in range(repeats):
        for number, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[number] = min(taken[number], time.perf_counter() - start)
    return taken
