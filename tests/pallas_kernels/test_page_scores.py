"""page_scores against plain numpy, and the promise that no key of a page scores more."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.page_bounds import ScaledBounds, make_bounds, page_bounds
from pallas_kernels.page_scores import page_scores
from pallas_kernels.page_scores.shapes import SHAPES, PagesShape

IMPLEMENTATIONS = ["xla", "cpu"]


def make(shape, dtype=jnp.float32, seed=0, extra_columns=3):
    rng = np.random.default_rng(seed)
    own = -(-np.array(shape.kv_len) // shape.page_size)
    pages = int(own.sum()) + 1
    ids = iter(rng.permutation(np.arange(1, pages)))
    table = np.zeros((len(own), max(own) + extra_columns), np.int32)
    for row, count in enumerate(own):
        table[row, :count] = [next(ids) for _ in range(count)]
    bounds = np.sort(rng.standard_normal((2, pages, shape.kv_heads, 2, shape.head_dim)), axis=3)
    q = rng.standard_normal((len(own), shape.q_heads, shape.head_dim))
    arrays = jnp.asarray(q, dtype), jnp.asarray(bounds, dtype), jnp.int32(1)
    return *arrays, jnp.asarray(table), jnp.asarray(shape.kv_len, jnp.int32)


def in_eight_bits(bounds, seed=0):
    """Some scaled bounds of the same shape."""
    rng = np.random.default_rng(seed)
    values = jnp.clip(jnp.asarray(bounds, jnp.float32) * 32, -127, 127).astype(jnp.int8)
    return ScaledBounds(values, jnp.asarray(2.0 ** rng.integers(-7, -3, bounds.shape[:3]), jnp.float32))


def own_scores(scores, shape):
    """What has a meaning."""
    return [np.asarray(row)[:, : -(-n // shape.page_size)] for row, n in zip(scores, shape.kv_len)]


def oracle(q, bounds, layer, table, kv_len):
    q, bounds = (np.asarray(a, np.float64) for a in (q, bounds))
    bounds = bounds[int(layer)].repeat(q.shape[1] // bounds.shape[2], axis=1)[
        np.asarray(table)
    ]  # [S, P, Hq, 2, D]
    q = q[:, None]
    return np.maximum(q * bounds[..., 0, :], q * bounds[..., 1, :]).sum(axis=-1).swapaxes(1, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["pocket_8k", "pocket_edges", "llama3_8b_page_32"])
def test_matches_numpy(name, dtype, implementation):
    shape = SHAPES[name]
    args = make(shape, jnp.dtype(dtype))
    got = page_scores(*args, page_size=shape.page_size, implementation=implementation)
    assert got.dtype == jnp.float32
    for mine, want in zip(own_scores(got, shape), own_scores(oracle(*args), shape)):
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["pocket_8k", "pocket_edges", "llama3_8b_page_32", "llama2_7b_4k"])
def test_bounds_in_eight_bits_score_as_what_they_stand_for(name, implementation):
    shape = SHAPES[name]
    q, bounds, *where = make(shape)
    scaled = in_eight_bits(bounds)
    got = page_scores(q, scaled, *where, page_size=shape.page_size, implementation=implementation)
    want = oracle(q, scaled.widened(), *where)
    for mine, theirs in zip(own_scores(got, shape), own_scores(want, shape)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spread", [0.0, 0.25])
def test_an_estimate_below_the_bound(spread, implementation):
    shape = PagesShape(6, 2, 64, 16, (300, 100))
    q, bounds, layer, table, kv_len = make(shape)
    got = page_scores(
        q, bounds, layer, table, kv_len, page_size=16, spread=spread, implementation=implementation
    )
    middle = bounds.at[:].set((bounds[:, :, :, :1] + bounds[:, :, :, 1:]) / 2)
    low, high = (oracle(q, b, layer, table, kv_len) for b in (middle, bounds))
    for mine, want in zip(own_scores(got, shape), own_scores(low + spread * (high - low), shape)):
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 96),
    shape=st.sampled_from([(4, 1, 16, 16), (6, 2, 64, 16), (2, 2, 32, 8), (4, 2, 16, 32)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    bounds_dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 999),
)
def test_no_key_of_a_page_scores_more(length, shape, dtype, bounds_dtype, shift, seed):
    q_heads, kv_heads, head_dim, page_size = shape
    rng = np.random.default_rng(seed)
    k = jnp.asarray(rng.standard_normal((96, kv_heads, head_dim)) + shift, dtype)
    q = jnp.asarray(rng.standard_normal((1, q_heads, head_dim)) * 2, dtype)
    pages = 96 // page_size
    table = rng.permutation(pages).astype(np.int32)
    position = np.arange(96)
    slots = np.where(position < length, table[position // page_size] * page_size + position % page_size, -1)
    stale = make_bounds((1, pages, kv_heads, head_dim), bounds_dtype)
    bounds = page_bounds(stale, 0, k, jnp.asarray(slots, jnp.int32), page_size=page_size)
    exact = np.einsum(
        "hd,khd->hk",
        np.asarray(q[0], np.float64),
        np.asarray(k, np.float64).repeat(q_heads // kv_heads, axis=1),
    )
    for implementation in IMPLEMENTATIONS:
        scores = page_scores(
            q, bounds, 0, table[None], jnp.array([length]), page_size=page_size, implementation=implementation
        )
        for page in range(-(-length // page_size)):
            inside = exact[:, page * page_size : min((page + 1) * page_size, length)]
            rounding = (
                1e-6
                * np.abs(np.asarray(q[0], np.float64)).sum(axis=-1)
                * np.abs(np.asarray(k, np.float64)).max()
            )
            assert np.all(np.asarray(scores[0, :, page]) >= inside.max(axis=1) - rounding)


def test_a_row_does_not_feel_its_neighbours():
    """Bit for bit."""
    shape = PagesShape(6, 2, 64, 16, (300, 700, 5))
    q, bounds, layer, table, kv_len = make(shape)
    together = own_scores(page_scores(q, bounds, layer, table, kv_len, page_size=16), shape)
    for row in range(3):
        one = slice(row, row + 1)
        alone = page_scores(q[one], bounds, layer, table[one], kv_len[one], page_size=16)
        np.testing.assert_array_equal(np.asarray(alone)[0, :, : together[row].shape[1]], together[row])
