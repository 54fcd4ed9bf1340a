"""page_attention against a brute-force softmax in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_attention.shapes import SHAPES, ListShape
from pallas_kernels.ragged_attention import ragged_attention

LAYERS = 2


def make(shape, dtype=jnp.float32, seed=0, extra_columns=2):
    rng = np.random.default_rng(seed)
    count = -(-np.array(shape.tokens) // shape.page_size)
    pages = max(int(count.max()), 1) * 2
    lists = np.zeros((len(count), shape.lists, max(count) + extra_columns), np.int32)
    tokens = np.zeros((len(count), shape.lists), np.int32)
    for row, n in enumerate(count):
        for head in range(shape.lists):
            mine = max(n - head, min(n, 1))  # lists of one row differ in length
            lists[row, head, :mine] = rng.permutation(pages)[:mine]
            tokens[row, head] = max(shape.tokens[row] - (n - mine) * shape.page_size, 0)
    q = rng.standard_normal((len(count), shape.q_heads, shape.head_dim))
    pool = (LAYERS, pages, shape.kv_heads, shape.page_size, shape.head_dim)
    arrays = (jnp.asarray(a, dtype) for a in (q, rng.standard_normal(pool), rng.standard_normal(pool)))
    return *arrays, jnp.int32(1), jnp.asarray(lists), jnp.asarray(tokens)


def oracle(q, k_pages, v_pages, layer, lists, tokens, scale):
    q, k_pages, v_pages = (np.asarray(a, np.float64) for a in (q, k_pages, v_pages))
    lists, tokens = np.asarray(lists), np.asarray(tokens)
    out = np.zeros(q.shape)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            mine, reads = head * lists.shape[1] // q.shape[1], head * k_pages.shape[2] // q.shape[1]
            n = tokens[row, mine]
            k, v = (
                p[int(layer), lists[row, mine], reads].reshape(-1, q.shape[2])[:n] for p in (k_pages, v_pages)
            )
            if n:
                weights = np.exp((scores := k @ q[row, head] * scale) - scores.max())
                out[row, head] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_matches_numpy(name, dtype):
    shape = SHAPES[name]
    args = make(shape, jnp.dtype(dtype))
    want = oracle(*args, 0.2)
    for implementation in ("xla", "cpu"):
        got = page_attention(*args, scale=0.2, implementation=implementation)
        assert got.dtype == jnp.dtype(dtype)
        tolerance = 2e-6 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_what_nobody_has_written_has_no_influence(implementation):
    shape = ListShape(6, 2, 64, 16, (40, 3, 16, 0), 2)
    q, k_pages, v_pages, layer, lists, tokens = make(shape)
    written = np.zeros((2, *k_pages.shape[1:4]), bool)
    for row in range(4):
        for head in range(2):
            p = np.arange(tokens[row, head])
            written[1, np.asarray(lists)[row, head, p // 16], head, p % 16] = True
    pools = k_pages, v_pages
    dirty = [jnp.where(written[..., None], pool, np.nan) for pool in pools]
    clean, got = (
        page_attention(q, *p, layer, lists, tokens, scale=0.2, implementation=implementation)
        for p in (pools, dirty)
    )
    np.testing.assert_array_equal(got, clean)


def test_all_pages_are_dense_attention():
    """To the bit on the CPU, where both are the same code."""
    shape = ListShape(12, 4, 64, 16, (500, 77, 16), 1)
    q, k_pages, v_pages, layer, lists, tokens = make(shape)
    rows = jnp.arange(3, dtype=jnp.int32), jnp.ones(3, jnp.int32), tokens[:, 0]
    want = ragged_attention(q, k_pages, v_pages, layer, lists[:, 0], *rows, scale=0.2, implementation="cpu")
    got = page_attention(q, k_pages, v_pages, layer, lists, tokens, scale=0.2, implementation="cpu")
    np.testing.assert_array_equal(got, want)
    each = jnp.repeat(lists, 4, axis=1), jnp.repeat(tokens, 4, axis=1)
    got = page_attention(q, k_pages, v_pages, layer, *each, scale=0.2, implementation="cpu")
    np.testing.assert_array_equal(got, want)
