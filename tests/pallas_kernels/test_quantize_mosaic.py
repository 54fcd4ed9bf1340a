"""quantize's Hopper kernel against its XLA twin, in the simulator, with races looked for; what is computed on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._mosaic import simulator
from pallas_kernels.quantize import Gated, Normed, quantize, values
from pallas_kernels.quantize.shapes import SIMULATED


def draw(shape):
    """Inputs with channels that stick out, and an order."""
    rng = np.random.default_rng(0)
    channels, count = shape.channels, 2 if shape.before == "gated" else 1
    x = rng.standard_normal((shape.rows, count, channels)) * rng.lognormal(0, 1, channels)
    x[-1] = 0
    x = jnp.asarray(x if count == 2 else x[:, 0], jnp.bfloat16)
    order = jnp.asarray(rng.permutation(channels), jnp.int32)
    if shape.before == "gated":
        return Gated(x, jax.nn.silu), None
    if shape.before == "normed":
        return Normed(x, jnp.asarray(rng.lognormal(0, 0.3, channels), jnp.bfloat16), 1e-5), order
    return x, order


@pytest.mark.parametrize("name", SIMULATED)
def test_integers_are_those_of_the_twin(name):
    shape = SIMULATED[name]
    x, order = draw(shape)
    want = quantize(x, order, **shape.settings, implementation="xla")
    with simulator():
        got = jax.block_until_ready(quantize(x, order, **shape.settings, implementation="mosaic_gpu"))
    for field, mine, twins in zip(got._fields, got, want):
        assert (mine is None) == (twins is None), field
        if twins is not None and field.endswith("scale"):
            np.testing.assert_allclose(mine, twins, rtol=1e-6)
        elif twins is not None:
            np.testing.assert_array_equal(mine, twins, err_msg=field)


@pytest.mark.parametrize("before", ["normed", "gated"])
def test_what_is_computed_on_the_way(before):
    """Rounding what the plain formula gives is the same."""
    rng = np.random.default_rng(1)
    settings = {"bits": 8, "outliers": 16}
    if before == "normed":
        x, scale = rng.standard_normal((4, 64)), rng.lognormal(0, 1, 64)
        lazy = Normed(*(jnp.asarray(a, jnp.float32) for a in (x, scale)), 1e-3)
        plain = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-3) * scale
    else:
        gate, up = rng.standard_normal((2, 4, 64))
        lazy = Gated(jnp.asarray(np.stack((gate, up), 1), jnp.float32), jax.nn.silu)
        plain = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(values(lazy), plain, rtol=1e-5, atol=1e-6)
    assert lazy.shape == plain.shape
    got, want = quantize(lazy, **settings), quantize(values(lazy), **settings)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("channels", "dtype", "chosen", "said"),
    [
        (200, "bfloat16", {}, "200 channels; a multiple of 128"),
        (256, "float32", {}, "activations of float32; bfloat16"),
        (256, "bfloat16", {"group": 64}, "groups of 64"),
        (256, "bfloat16", {"outliers": 16}, "16 outlier channels"),
        (256, "bfloat16", {"bits": 16, "outlier_bits": 16}, "16 bits, outliers in 16"),
    ],
)
def test_what_the_kernel_leaves_to_xla(channels, dtype, chosen, said):
    settings = {"bits": 8, "outliers": 128} | chosen
    with pytest.raises(NotImplementedError, match=said), simulator():
        quantize(jnp.zeros((2, channels), dtype), None, **settings, implementation="mosaic_gpu")


def test_another_activation_is_left_to_xla():
    x = Gated(jnp.zeros((2, 2, 256), jnp.bfloat16), jax.nn.relu)
    with pytest.raises(NotImplementedError, match="other than silu"), simulator():
        quantize(x, None, bits=8, outliers=128, implementation="mosaic_gpu")
