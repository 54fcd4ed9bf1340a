"""ragged_attention against a brute-force softmax in float64."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_attention import ragged_attention
from pallas_kernels.ragged_attention.shapes import SHAPES, AttentionShape

IMPLEMENTATIONS = ["xla", "cpu"]
LAYERS = 2


def make(shape, dtype=jnp.float32, seed=0, gap=3):
    """Arguments of ragged_attention; `gap` tokens before, between and after the rows belong to nobody."""
    rng = np.random.default_rng(seed)
    query_len, kv_len = np.array(shape.rows, np.int32).reshape(-1, 2).T
    order = rng.permutation(len(query_len))
    query_start = np.zeros_like(query_len)
    tokens = gap
    for s in order:
        query_start[s] = tokens
        tokens += int(query_len[s]) + gap
    row_pages = -(-kv_len // shape.page_size)
    pages = int(row_pages.sum()) + 1
    ids = iter(rng.permutation(np.arange(1, pages)))
    table = np.zeros((len(row_pages), max(int(row_pages.max()), 1) + 1), np.int32)
    for s, count in enumerate(row_pages):
        table[s, :count] = [next(ids) for _ in range(count)]
    pool = (LAYERS, pages, shape.kv_heads, shape.page_size, shape.head_dim)
    q = rng.standard_normal((tokens, shape.q_heads, shape.head_dim), np.float32)
    k_pages, v_pages = (rng.standard_normal(pool, np.float32) for _ in range(2))
    arrays = (jnp.asarray(a, dtype) for a in (q, k_pages, v_pages))
    return (*arrays, jnp.int32(1), *(jnp.asarray(a) for a in (table, query_start, query_len, kv_len)))


def oracle(q, k_pages, v_pages, layer, table, query_start, query_len, kv_len, scale, window):
    q, k_pages, v_pages = (np.asarray(a, np.float64) for a in (q, k_pages, v_pages))
    out = np.zeros(q.shape)
    group = q.shape[1] // k_pages.shape[2]
    for s in range(len(query_len)):
        # [kv, Hq, D]
        k, v = (
            np.repeat(
                pool[int(layer), np.asarray(table[s])].swapaxes(1, 2).reshape(-1, *pool.shape[2::2]), group, 1
            )
            for pool in (k_pages, v_pages)
        )
        for j in range(int(query_len[s])):
            position = int(kv_len[s] - query_len[s]) + j
            low = max(0, position + 1 - window) if window > 0 else 0
            scores = np.einsum("hd,khd->hk", q[query_start[s] + j], k[low : position + 1]) * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[query_start[s] + j] = np.einsum("hk,khd->hd", weights, v[low : position + 1])
    return out


def check(shape, window=0, dtype=jnp.float32, implementations=IMPLEMENTATIONS, seed=0):
    args = make(shape, dtype, seed)
    scale = shape.head_dim**-0.5
    want = oracle(*args, scale, window)
    for implementation in implementations:
        got = ragged_attention(*args, scale=scale, window=window, implementation=implementation)
        assert got.dtype == dtype and got.shape == args[0].shape
        tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


MIXED = ((1, 5), (40, 40), (0, 0), (1, 1), (7, 30), (1, 130), (2, 2), (33, 170))


@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64, 96, 128])
def test_head_dims_and_windows(head_dim, window):
    check(AttentionShape(6, 2, head_dim, 16, MIXED), window)


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (8, 1), (12, 4), (14, 2)])
@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_groups_and_pages(page_size, heads):
    check(AttentionShape(*heads, 32, page_size, MIXED), 50)


@pytest.mark.parametrize("window", [0, 20])
def test_bfloat16(window):
    check(AttentionShape(8, 2, 64, 16, MIXED), window, jnp.bfloat16)


@pytest.mark.parametrize("name", ["pocket_mixed", "llama3_8b_decode"])
def test_real_shapes(name):
    check(SHAPES[name])


def test_long_context():
    check(AttentionShape(4, 2, 32, 16, ((1, 9000), (70, 9001), (1, 4096), (1, 4097))))


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_nobody_has_written_has_no_influence(garbage, page_size, window):
    shape = AttentionShape(6, 2, 32, page_size, MIXED)
    q, k_pages, v_pages, layer, table, *rest = make(shape)
    written = np.zeros((k_pages.shape[1], page_size), bool)
    for pages, kv_len in zip(np.asarray(table), np.asarray(rest[2]), strict=True):
        p = np.arange(kv_len)
        written[pages[p // page_size], p % page_size] = True
    mine = (np.arange(LAYERS) == int(layer))[:, None, None] & written
    dirty = [jnp.where(mine[:, :, None, :, None], pool, garbage) for pool in (k_pages, v_pages)]
    for implementation in IMPLEMENTATIONS:
        clean, got = (
            ragged_attention(
                q, *pools, layer, table, *rest, scale=0.2, window=window, implementation=implementation
            )
            for pools in ((k_pages, v_pages), dirty)
        )
        np.testing.assert_array_equal(got, clean)


rows = st.lists(
    st.integers(0, 90).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 260))), min_size=1, max_size=6
)


@settings(max_examples=20, deadline=None)
@given(rows=rows, window=st.integers(0, 40), seed=st.integers(0, 9))
def test_any_rows(rows, window, seed):
    padded = tuple(rows) + ((0, 0),) * (6 - len(rows))
    check(AttentionShape(4, 2, 16, 8, padded), window, implementations=["cpu"], seed=seed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_over_layers_with_a_window_each(implementation):
    shape = AttentionShape(6, 2, 32, 16, MIXED)
    q, k_pages, v_pages, _, *rest = make(shape)
    windows = jnp.array([0, 20])

    @jax.jit
    def both(q, k_pages, v_pages, *rest):
        def one(_, xs):
            args = (q, k_pages, v_pages, xs[0], *rest)
            return None, ragged_attention(*args, scale=0.2, window=xs[1], implementation=implementation)

        return jax.lax.scan(one, None, (jnp.arange(LAYERS), windows))[1]

    got = both(q, k_pages, v_pages, *rest)
    for layer in range(LAYERS):
        want = oracle(q, k_pages, v_pages, layer, *rest, 0.2, int(windows[layer]))
        np.testing.assert_allclose(got[layer], want, rtol=2e-6, atol=2e-6)


def test_a_row_does_not_feel_its_neighbours_or_its_chunking():
    """Bit for bit: the same query over the same pages, alone, among others, or in another chunk."""
    shape = AttentionShape(6, 2, 64, 16, ((1, 300), (150, 400), (1, 77), (30, 30)))
    q, k_pages, v_pages, layer, table, start, length, kv_len = make(shape)

    def run(start, length, kv_len, table):
        args = (q, k_pages, v_pages, layer, table, start, length, kv_len)
        return np.asarray(ragged_attention(*args, scale=0.125, window=0, implementation="cpu"))

    together = run(start, length, kv_len, table)
    for s in range(4):
        one = slice(s, s + 1)
        mine = slice(int(start[s]), int(start[s] + length[s]))
        np.testing.assert_array_equal(
            run(start[one], length[one], kv_len[one], table[one])[mine], together[mine]
        )
    cut = jnp.array([37, 113])
    halves = run(
        start[1] + jnp.array([0, 37]), cut, kv_len[1] - jnp.array([113, 0]), table[jnp.array([1, 1])]
    )
    mine = slice(int(start[1]), int(start[1] + length[1]))
    np.testing.assert_array_equal(halves[mine], together[mine])


def test_many_python_threads():
    args = make(AttentionShape(6, 2, 32, 16, MIXED))
    run = jax.jit(lambda *a: ragged_attention(*a, scale=0.2, window=0, implementation="cpu"))
    want = np.asarray(run(*args))

    def repeat(_):
        return [np.asarray(run(*args)) for _ in range(40)]

    with ThreadPoolExecutor(6) as pool:
        for results in pool.map(repeat, range(6)):
            for got in results:
                np.testing.assert_array_equal(got, want)
