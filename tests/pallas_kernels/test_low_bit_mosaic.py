"""int4_matmul's Hopper kernel against its XLA twin, in the simulator, with races looked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_int4_matmul import draw

from pallas_kernels._mosaic import simulator
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.int4_matmul.shapes import SIMULATED, LowBitShape


def powers_of_two(scale):
    """Scales by which nothing is rounded, so that results are as exact as the integers behind them."""
    return None if scale is None else np.exp2(np.round(np.log2(scale))).astype(np.float32)


@pytest.mark.parametrize("mode", ["w4a8", "w4a4"])
@pytest.mark.parametrize("name", SIMULATED)
def test_integers_are_those_of_the_twin(name, mode):
    x, w, _, sizes = draw(SIMULATED[name], mode)
    x = x._replace(low_scale=powers_of_two(x.low_scale), high_scale=powers_of_two(x.high_scale))
    w = w._replace(channel=powers_of_two(w.channel), high_scale=powers_of_two(w.high_scale))
    if mode == "w4a4":
        w = w._replace(scale=powers_of_two(w.scale))
    sizes = None if sizes is None else jnp.asarray(sizes)
    with simulator():
        got = jax.block_until_ready(int4_matmul(x, w, sizes, implementation="mosaic_gpu"))
    np.testing.assert_array_equal(got, int4_matmul(x, w, sizes, implementation="xla"))


@pytest.mark.parametrize("name", ["plain", "plain_experts"])
def test_floats_are_those_of_the_twin_but_for_their_sums(name):
    """Codes are whole and group scales powers of two, so that bfloat16 products are exact; sums have another order."""
    x, w, _, sizes = draw(SIMULATED[name], "w4a16")
    x = x._replace(low=jnp.asarray(x.low, jnp.bfloat16))
    w = w._replace(scale=powers_of_two(w.scale))
    sizes = None if sizes is None else jnp.asarray(sizes)
    with simulator():
        got = jax.block_until_ready(int4_matmul(x, w, sizes, implementation="mosaic_gpu"))
    want = np.asarray(int4_matmul(x, w, sizes, implementation="xla"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("shape", "mode", "said"),
    [
        (LowBitShape(4, 256, 64, 64), "w4a8", "groups of 64 channels; 128"),
        (LowBitShape(4, 256, 96), "w4a8", "96 outputs; a multiple of 64"),
        (LowBitShape(4, 192, 64, 128, 64), "w4a4", "64 outlier channels of int8; 128"),
        (LowBitShape(4, 256, 64), "w4a16", "activations of float32"),
        (LowBitShape(4, 256, 64), "w8a8", "groups of no channels"),
    ],
)
def test_what_the_kernel_leaves_to_xla(shape, mode, said):
    x, w, _, _ = draw(shape, mode)
    with pytest.raises(NotImplementedError, match=said), simulator():
        int4_matmul(x, w, implementation="mosaic_gpu")
