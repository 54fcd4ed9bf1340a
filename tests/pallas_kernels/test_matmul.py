"""matmul against numpy in float64."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.matmul import matmul
from pallas_kernels.matmul.shapes import SHAPES, MatmulShape

IMPLEMENTATIONS = ["xla", "cpu"]
# None: whatever the op chooses for the shape.
EVERY_WAY = [*IMPLEMENTATIONS, None]


def make(shape, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((shape.rows, shape.depth), np.float32)
    w = rng.standard_normal((shape.depth, shape.columns), np.float32) * shape.depth**-0.5
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def oracle(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


def check(shape, dtype="float32", seed=0, implementations=EVERY_WAY):
    x, w = make(shape, dtype, seed)
    want = oracle(x, w)
    for implementation in implementations:
        got = matmul(x, w, implementation=implementation)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", list(SHAPES))
def test_real_shapes(name):
    check(SHAPES[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [8, 24, 64, 200, 1288])
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 12, 13, 31, 70])
def test_rows_and_columns(rows, columns, dtype):
    check(MatmulShape(rows, 300, columns), dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    depth=st.integers(1, 700),
    columns=st.integers(1, 90),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 9),
)
def test_any_shape(rows, depth, columns, dtype, seed):
    check(MatmulShape(rows, depth, 8 * columns), dtype, seed, ["cpu"])


@pytest.mark.parametrize("shape", [(3, 7, 5), (8, 768, 1001), (0, 16, 16), (4, 0, 16)])
def test_what_the_kernel_cannot_goes_to_xla(shape):
    x, w = make(MatmulShape(*(max(size, 1) for size in shape)))
    x, w = x[: shape[0], : shape[1]], w[: shape[1]]
    with pytest.raises(NotImplementedError):
        matmul(x, w, implementation="cpu")
    np.testing.assert_allclose(matmul(x, w), oracle(x, w), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_feel_the_others(dtype):
    x, w = make(MatmulShape(40, 1024, 328), dtype)
    together = matmul(x, w, implementation="cpu")
    for rows in (slice(0, 1), slice(7, 12), slice(15, 40)):
        np.testing.assert_array_equal(matmul(x[rows], w, implementation="cpu"), together[rows])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_scan(implementation):
    x, w = make(MatmulShape(9, 96, 96))
    stacked = jnp.stack([w, -w, 0.5 * w])

    @jax.jit
    def layers(x, stacked):
        return jax.lax.scan(lambda x, w: (x + matmul(x, w, implementation=implementation), None), x, stacked)[
            0
        ]

    want = np.asarray(x, np.float64)
    for w in stacked:
        want = want + oracle(want, w)
    np.testing.assert_allclose(layers(x, stacked), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives(dtype):
    x, w = make(MatmulShape(9, 96, 104), dtype)

    def loss(implementation):
        return lambda x, w: jnp.sum(jnp.sin(matmul(x, w, implementation=implementation)))

    got, want = (jax.grad(loss(way), argnums=(0, 1))(x, w) for way in ("cpu", "xla"))
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for g, expected in zip(got, want, strict=True):
        assert g.dtype == expected.dtype
        np.testing.assert_allclose(
            np.asarray(g, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
        )


def test_many_python_threads():
    x, w = make(MatmulShape(14, 256, 1024))
    run = jax.jit(lambda x, w: matmul(x, w, implementation="cpu"))
    want = np.asarray(run(x, w))

    def repeat(_):
        return [np.asarray(run(x, w)) for _ in range(40)]

    with ThreadPoolExecutor(6) as pool:
        for results in pool.map(repeat, range(6)):
            for got in results:
                np.testing.assert_array_equal(got, want)
