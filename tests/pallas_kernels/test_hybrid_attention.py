"""hybrid_attention against the oracles of its parts, and its Hopper kernel against theirs in the simulator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_page_attention as page_tests
import test_ragged_attention as ragged_tests

from pallas_kernels._mosaic import simulator
from pallas_kernels.hybrid_attention import hybrid_attention, xla
from pallas_kernels.hybrid_attention.shapes import PACKED, SIMULATED, MixedShape
from pallas_kernels.packed_pages import PackedPages, pack, unpack

LAYER, PADDING = 1, 2


def make(shape, dtype=jnp.float32, seed=0, padding=PADDING):
    """Arguments of hybrid_attention: decoding rows, chunks and rows of nothing in some order, tokens of nobody between."""
    rng = np.random.default_rng(seed)
    page, pages = shape.page_size, 40
    kinds = rng.permutation(
        [(1, n, n) for n in shape.decodes] + [(c, n, 0) for c, n in shape.chunks] + [(0, 0, 0)] * padding
    ).reshape(-1, 3)
    query_len, kv_len, listed = kinds.T.astype(np.int32)
    starts = np.cumsum(query_len + 2, dtype=np.int32) - query_len
    width = max(1, -(-int(kv_len.max(initial=1)) // page))
    table = rng.integers(0, pages, (len(kinds), width)).astype(np.int32)
    lists = rng.integers(0, pages, (len(kinds), shape.lists, width)).astype(np.int32)
    tokens = np.maximum(listed[:, None] - page * np.arange(shape.lists), np.minimum(listed[:, None], 1))
    pool = (2, pages, shape.kv_heads, page, shape.head_dim)
    q = rng.standard_normal((int(starts[-1] + query_len[-1]) + 3, shape.q_heads, shape.head_dim))
    arrays = (jnp.asarray(a, dtype) for a in (q, rng.standard_normal(pool), rng.standard_normal(pool)))
    of_rows = (table, starts, query_len, kv_len, listed > 0, lists, tokens.astype(np.int32))
    return (*arrays, jnp.int32(LAYER), *(jnp.asarray(a) for a in of_rows))


def check_against_oracles(args, got, tolerance):
    q, k, v, layer, table, starts, counts, kv_len, single, lists, tokens = args
    want = ragged_tests.oracle(q, k, v, layer, table, starts, np.where(single, 0, counts), kv_len, 0.2, 0)
    rows = np.flatnonzero(single)
    if rows.size:
        decoding = (np.asarray(a)[rows] for a in (q[starts], lists, tokens))
        q_rows, lists, tokens = decoding
        want[np.asarray(starts)[rows]] = page_tests.oracle(q_rows, k, v, layer, lists, tokens, 0.2)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("bits", [16, 8])
def test_without_a_gpu_the_parts_run_in_sequence(name, bits):
    args = make(SIMULATED[name])
    if bits == 8:
        pools = [PackedPages(*pack(pool, 8)) for pool in args[1:3]]
        got = hybrid_attention(args[0], *pools, *args[3:], scale=0.2)
        check_against_oracles(args, got, 0.05)
    else:
        check_against_oracles(args, hybrid_attention(*args, scale=0.2), 2e-6)


@pytest.mark.parametrize(
    ("name", "pace"),
    [
        ("both", 1.0),
        pytest.param("both", 3.0, marks=pytest.mark.slow),
        ("chosen", 1.0),
        ("prefill_alone", 1.0),
        ("decode_alone", 1.0),
        ("nothing", 1.0),
    ],
)
def test_the_kernel_gives_what_the_two_kernels_give(name, pace):
    """Bit for bit, with races looked for."""
    args = make(SIMULATED[name], jnp.bfloat16)
    with simulator():
        together = functools.partial(hybrid_attention, pace=pace, implementation="mosaic_gpu")
        got = jax.block_until_ready(together(*args, scale=0.2))
        want = xla.hybrid_attention(*args, scale=0.2, window=0, implementation="mosaic_gpu")
        np.testing.assert_array_equal(got, want)
    check_against_oracles(args, got, 3e-2)


def packed(args, bits):
    """The arguments with pools of so many bits, and with what their codes stand for in bfloat16."""
    pools = [PackedPages(*pack(pool, bits)) for pool in args[1:3]]
    opened = [unpack(*pool, bits).astype(jnp.bfloat16) for pool in pools]
    return (args[0], *pools, *args[3:]), (args[0], *opened, *args[3:])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "dense_int8" else []) for name in PACKED]
)
def test_packed_pools(name):
    """Bit for bit again, for all rows, those of either role and none: a kernel's compilation is what the simulator's time goes to."""
    shape, bits = PACKED[name]
    args, meant = packed(make(shape, jnp.bfloat16, padding=0), bits)
    *pools, starts, counts, kv_len, single, lists, tokens = args
    settings = {"scale": 0.2, "implementation": "mosaic_gpu"}
    together = jax.jit(functools.partial(hybrid_attention, **settings))
    apart = jax.jit(functools.partial(xla.hybrid_attention, window=0, **settings))
    with simulator():
        for mix in (single | True, ~single, single, single & False):
            of_rows = (starts, jnp.where(mix, counts, 0), kv_len, single & mix, lists)
            of_rows = (*of_rows, jnp.where(mix[:, None], tokens, 0))
            got = jax.block_until_ready(together(*pools, *of_rows))
            np.testing.assert_array_equal(got, apart(*pools, *of_rows))
            check_against_oracles((*meant[:5], *of_rows), got, 3e-2)


def test_limits():
    args = make(MixedShape(4, 2, 64, 16, ((3, 3),), (5,)), jnp.bfloat16)
    call = functools.partial(hybrid_attention, scale=0.2, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="4 bits of head dimension 64; 128"), simulator():
        call(*packed(args, 4)[0])
    with pytest.raises(ValueError, match=r"pace 0\.5; 1 or more"), simulator():
        call(*args, pace=0.5)
    with pytest.raises(NotImplementedError, match="H200"):
        call(*args)
