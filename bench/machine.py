"""This machine's own limits, measured where they are compared with: matmul rate and memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of several calls, after one to warm up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(dtype: str = "float32", size: int = 2048) -> float:
    """Operations per second of a square matrix product."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2.0 * size**3 / seconds(lambda: product(a, a))


def memory_bandwidth(megabytes: int = 256) -> float:
    """Bytes per second of reading an array once."""
    a = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return a.nbytes / seconds(lambda: total(a))
