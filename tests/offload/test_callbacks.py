"""Ten thousand steps with callbacks: none hangs, nothing grows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import OffloadSettings
from jaxinfer.models.moe import route
from jaxinfer.offload.offload import Offload

from .engines import LAYERS, MOE, model, store


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["host", "stream"])
def test_ten_thousand_steps(tmp_path, policy):
    settings = OffloadSettings(device_memory="1GiB", policy=policy, folder=str(tmp_path))
    offload = Offload(store(tmp_path), MOE, settings, 5)
    router = model().runs[0].mlp.router[0]

    @jax.jit
    def steps(x, pool, count):
        """Each step goes through all layers; its result is the next one's input."""
        experts = offload.bind(pool)

        def step(_, x):
            for layer in LAYERS:
                ids, shares = route(jnp.dot(x, router), MOE.moe)
                y = experts(layer, x, ids, shares)
                x = x + y / (1 + jnp.linalg.norm(y))
            return x / jnp.linalg.norm(x)

        return jax.lax.fori_loop(0, count, step, x)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, MOE.hidden_size), np.float32))
    sizes = []
    for _ in range(20):
        x = jax.block_until_ready(steps(x, offload.pool, 500))
        sizes.append(resident_bytes())
    assert offload.take_failure() is None
    assert offload.metrics()["expert_layers"] >= 20 * 500 * len(LAYERS)
    assert np.isfinite(np.asarray(x)).all()
    assert max(sizes[5:]) - sizes[4] < 2**22, sizes
    offload.close()
