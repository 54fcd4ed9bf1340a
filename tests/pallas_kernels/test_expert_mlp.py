"""expert_mlp against a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels._mosaic import simulator
from pallas_kernels.expert_mlp import expert_mlp, grouped_matmul
from pallas_kernels.expert_mlp.shapes import SHAPES, SIMULATED, ExpertShape

IMPLEMENTATIONS = ["xla", "cpu"]


def make(shape, dtype=jnp.float32, seed=0, skip=0.0):
    rng = np.random.default_rng(seed)
    t, d, f, e = shape.tokens, shape.model_dim, shape.hidden_dim, shape.experts
    x = rng.standard_normal((t, d), np.float32)
    gate_up = rng.standard_normal((e, d, 2 * f), np.float32) * d**-0.5
    down = rng.standard_normal((e, f, d), np.float32) * f**-0.5
    ids = np.argsort(rng.random((t, e)), axis=1)[:, : shape.top_k].astype(np.int32)
    ids[rng.random(ids.shape) < skip] = -1
    weights = rng.random(ids.shape, np.float32)
    return *(jnp.asarray(a, dtype) for a in (x, gate_up, down)), jnp.asarray(ids), jnp.asarray(weights)


def oracle(x, gate_up, down, ids, weights, activation="silu"):
    x, gate_up, down, weights = (np.asarray(a, np.float64) for a in (x, gate_up, down, weights))
    out = np.zeros_like(x)
    for t, k in np.ndindex(*ids.shape):
        if ids[t, k] >= 0:
            gate, up = np.split(x[t] @ gate_up[ids[t, k]], 2)
            if activation == "silu":
                gate = gate / (1 + np.exp(-gate))
            else:
                gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            out[t] += weights[t, k] * ((gate * up) @ down[ids[t, k]])
    return out


def check(args, activation="silu", implementations=IMPLEMENTATIONS):
    want = oracle(*args, activation)
    for implementation in implementations:
        got = expert_mlp(*args, activation=activation, implementation=implementation)
        assert got.dtype == args[0].dtype
        tolerance = 1e-5 if got.dtype == jnp.float32 else 3e-2
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["pocket_decode_1", "pocket_decode_8", "pocket_decode_64"])
def test_real_shapes(name):
    check(make(SHAPES[name]))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_dtypes_and_activations(tokens, dtype, activation):
    check(make(ExpertShape(tokens, 48, 80, 4, 3), jnp.dtype(dtype), skip=0.2), activation)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 70),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    experts=st.integers(1, 6),
    skip=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_shape(tokens, dims, experts, skip):
    shape = ExpertShape(tokens, 16 * dims[0], 16 * dims[1], experts, min(2, experts))
    check(make(shape, skip=skip), implementations=["cpu"])


def test_all_tokens_to_one_expert():
    x, gate_up, down, ids, weights = make(ExpertShape(40, 64, 96, 4, 1))
    check((x, gate_up, down, jnp.full_like(ids, 2), weights))


def test_deep_contraction():
    check(make(ExpertShape(9, 1040, 2064, 2, 1)))


def test_a_token_does_not_feel_the_others():
    args = make(ExpertShape(30, 64, 96, 4, 2), skip=0.1)
    together = expert_mlp(*args, implementation="cpu")
    x, gate_up, down, ids, weights = args
    for t in (0, 7, 29):
        one = slice(t, t + 1)
        alone = expert_mlp(x[one], gate_up, down, ids[one], weights[one], implementation="cpu")
        np.testing.assert_array_equal(alone, together[one])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_scan(implementation):
    x, gate_up, down, ids, weights = make(ExpertShape(20, 32, 48, 4, 2))
    stacked = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), (gate_up, down))

    @jax.jit
    def layers(x, stacked):
        def one(x, w):
            return x + expert_mlp(x, *w, ids, weights, implementation=implementation), None

        return jax.lax.scan(one, x, stacked)[0]

    want = x
    for layer in range(3):
        want = want + oracle(want, stacked[0][layer], stacked[1][layer], ids, weights)
    np.testing.assert_allclose(layers(x, stacked), want, rtol=2e-5, atol=2e-5)


def test_grouped_matmul():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((50, 24), np.float32), rng.standard_normal((4, 24, 40), np.float32)
    sizes = np.array([13, 0, 30, 2], np.int32)
    want = np.zeros((50, 40))
    for group, rows in enumerate(np.split(np.arange(45), np.cumsum(sizes)[:-1])):
        want[rows] = x[rows].astype(np.float64) @ w[group]
    np.testing.assert_allclose(
        grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes)), want, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "wide" else []) for name in SIMULATED]
)
def test_hopper_kernel_in_the_simulator(name):
    args = make(SIMULATED[name], jnp.bfloat16, skip=0.2)
    activation = "gelu_tanh" if name == "wide" else "silu"
    with simulator():
        got = jax.block_until_ready(expert_mlp(*args, activation=activation, implementation="mosaic_gpu"))
    np.testing.assert_allclose(np.asarray(got, np.float64), oracle(*args, activation), rtol=3e-2, atol=3e-2)


def test_hopper_kernel_where_no_pair_is_wanted():
    args = make(SIMULATED["narrow"], jnp.bfloat16, skip=1.0)
    with simulator():
        got = jax.block_until_ready(expert_mlp(*args, implementation="mosaic_gpu"))
    assert not np.any(got)


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        (ExpertShape(2, 128, 96, 2, 1), "bfloat16", "experts of 128 by 96"),
        (ExpertShape(2, 192, 128, 2, 1), "bfloat16", "experts of 192 by 128"),
        (ExpertShape(2, 128, 64, 2, 1), "float32", "float32 by float32; bfloat16"),
    ],
)
def test_what_the_hopper_kernel_leaves_to_xla(shape, dtype, said):
    with pytest.raises(NotImplementedError, match=said), simulator():
        expert_mlp(*make(shape, jnp.dtype(dtype)), implementation="mosaic_gpu")
