"""Ten thousand steps with callbacks: none hangs, nothing grows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import OffloadSettings
from jaxinfer.engine.paged import PagedCache
from jaxinfer.models.decoder import without_experts
from jaxinfer.models.moe import route
from jaxinfer.offload.offload import Offload
from jaxinfer.offload.policy import POLICIES

from .engines import EXPERT, LAYERS, MOE, model, store


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_the_pool_stays_where_it_is(tmp_path):
    """XLA writes slots in place: a copy of the pool would be a copy of most of the device."""
    settings = OffloadSettings(device_memory="1GiB", folder=str(tmp_path))
    offload = Offload(store(tmp_path), without_experts(model()), MOE, settings, 17)

    def step(cache, records, x, ids):
        return jax.lax.fori_loop(
            0, 3, lambda layer, both: offload.bind(records)(both[0], 0, both[1], ids, jnp.ones((3, 2)))[::-1],
            (cache, x),
        )  # fmt: skip

    cache = PagedCache(None, slots=offload.move_in())
    given = (offload.records, jnp.zeros((3, MOE.hidden_size)), jnp.zeros((3, 2), jnp.int32))
    memory = jax.jit(step, donate_argnums=0).lower(cache, *given).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 17 * EXPERT
    assert memory.temp_size_in_bytes < 17 * EXPERT / 2
    offload.close()


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_ten_thousand_steps(tmp_path, policy):
    settings = OffloadSettings(device_memory="1GiB", policy=policy, folder=str(tmp_path))
    offload = Offload(store(tmp_path), without_experts(model()), MOE, settings, 5)
    router = model().runs[0].mlp.router[0]

    @jax.jit
    def steps(x, cache, records, count):
        """Each step goes through all layers; its result is the next one's input."""
        experts = offload.bind(records)

        def step(_, carry):
            x, cache = carry
            for layer in LAYERS:
                ids, shares = route(jnp.dot(x, router), MOE.moe)
                y, cache = experts(cache, layer, x, ids, shares)
                x = x + y / (1 + jnp.linalg.norm(y))
            return x / jnp.linalg.norm(x), cache

        return jax.lax.fori_loop(0, count, step, (x, cache))

    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, MOE.hidden_size), np.float32))
    sizes, cache = [], PagedCache(None, slots=offload.move_in())
    for _ in range(20):
        x, cache = jax.block_until_ready(steps(x, cache, offload.records, 500))
        sizes.append(resident_bytes())
    assert offload.take_failure() is None
    assert offload.metrics()["expert_layers"] >= 20 * 500 * len(LAYERS)
    assert np.isfinite(np.asarray(x)).all()
    offload.residents.check_integrity()
    assert max(sizes[5:]) - sizes[4] < 2**22, sizes
    offload.close()
