"""page_bounds against plain numpy: recycled pages, several tokens into one page, in place."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.page_bounds import ScaledBounds, make_bounds, page_bounds
from pallas_kernels.page_bounds.shapes import SHAPES

IMPLEMENTATIONS = ["xla", "cpu"]


def make(shape, dtype=jnp.float32, seed=0):
    """bounds full of another sequence's values, keys, slots with gaps that skip."""
    rng = np.random.default_rng(seed)
    bounds = rng.standard_normal((shape.layers, shape.pages, shape.kv_heads, 2, shape.head_dim)) * 3
    ids, slots = iter(rng.permutation(shape.pages)), [-1, -7]
    for start, tokens in shape.runs:
        position = start + np.arange(tokens)
        pages = np.array(
            [next(ids) for _ in range(position[-1] // shape.page_size - start // shape.page_size + 1)]
        )
        slots += list(
            pages[position // shape.page_size - start // shape.page_size] * shape.page_size
            + position % shape.page_size
        )
        slots.append(-1)
    k = rng.standard_normal((len(slots), shape.kv_heads, shape.head_dim))
    return jnp.asarray(np.sort(bounds, axis=3), dtype), jnp.asarray(k, dtype), np.array(slots, np.int32)


def oracle(bounds, layer, k, slots, page_size):
    bounds, k = np.array(bounds), np.asarray(k)
    for page in {slot // page_size for slot in slots if slot >= 0}:
        new = k[slots // page_size == page]
        old = bounds[layer, page]
        if page * page_size in slots:
            old = np.stack([new[0], new[0]], axis=1)
        bounds[layer, page, :, 0] = np.minimum(old[:, 0], new.min(axis=0))
        bounds[layer, page, :, 1] = np.maximum(old[:, 1], new.max(axis=0))
    return bounds


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_matches_numpy(name, dtype, implementation):
    shape = SHAPES[name]
    bounds, k, slots = make(shape, jnp.dtype(dtype))
    layer = shape.layers - 1
    got = page_bounds(bounds, layer, k, slots, page_size=shape.page_size, implementation=implementation)
    np.testing.assert_array_equal(got, oracle(bounds, layer, k, slots, shape.page_size))


def test_small_heads_go_to_xla():
    shape = SHAPES["tiny"]
    bounds, k, slots = make(shape)
    with pytest.raises(NotImplementedError, match="head dimension 8"):
        page_bounds(bounds, 0, k, slots, page_size=8, implementation="cpu")
    got = page_bounds(bounds, 1, k, slots, page_size=shape.page_size)
    np.testing.assert_array_equal(got, oracle(bounds, 1, k, slots, 8))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bounds_with_fewer_digits_are_rounded_outward(implementation):
    rng = np.random.default_rng(0)
    k = rng.standard_normal((64, 2, 64)).astype(np.float32) * rng.choice(
        [1e-20, 1, 1e20], (64, 2, 64)
    ).astype(np.float32)
    k[rng.random(k.shape) < 0.1] = 0
    stale = jnp.zeros((1, 4, 2, 2, 64), jnp.bfloat16)
    slots = jnp.arange(64, dtype=jnp.int32)
    args = stale, 0, jnp.asarray(k), slots
    low, high = np.moveaxis(
        np.asarray(page_bounds(*args, page_size=16, implementation=implementation)[0], np.float32), 2, 0
    )
    exact = k.reshape(4, 16, 2, 64)
    assert np.all(low <= exact.min(axis=1)) and np.all(high >= exact.max(axis=1))
    np.testing.assert_allclose(low, exact.min(axis=1), rtol=2**-7)
    np.testing.assert_allclose(high, exact.max(axis=1), rtol=2**-7)


def test_keys_that_bounds_cannot_hold_are_named():
    stale = jnp.zeros((1, 4, 2, 2, 64), jnp.float16)
    with pytest.raises(ValueError, match="keys of float32 for bounds of float16"):
        page_bounds(
            stale, 0, jnp.zeros((1, 2, 64)), jnp.zeros(1, jnp.int32), page_size=16, implementation="xla"
        )


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 70), max_size=5, unique=True), seed=st.integers(0, 99))
def test_any_chunking_gives_the_bounds_of_the_keys_so_far(cuts, seed):
    """70 tokens written in chunks into recycled pages: after each chunk every page has the bounds of what it holds."""
    rng = np.random.default_rng(seed)
    table = rng.permutation(8)[:5]
    k = rng.standard_normal((70, 2, 16)).astype(np.float32)
    stale = jnp.asarray(rng.standard_normal((1, 8, 2, 2, 16)) * 9, jnp.float32)
    edges = [0, *sorted(cuts), 70]
    states = dict.fromkeys(IMPLEMENTATIONS, stale)
    for begin, end in itertools.pairwise(edges):
        position = np.arange(70)
        slots = table[position // 16] * 16 + position % 16
        slots = np.where((position >= begin) & (position < end), slots, -1).astype(np.int32)
        for implementation in IMPLEMENTATIONS:
            bounds = page_bounds(
                states[implementation], 0, jnp.asarray(k), slots, page_size=16, implementation=implementation
            )
            states[implementation] = bounds
            for page in range(-(-end // 16)):
                held = k[16 * page : min(16 * page + 16, end)]
                np.testing.assert_array_equal(bounds[0, table[page], :, 0], held.min(axis=0))
                np.testing.assert_array_equal(bounds[0, table[page], :, 1], held.max(axis=0))


def eight_bits(keys):
    """Of a page's keys [tokens, Hkv, D]: bounds [Hkv, 2, D] in whole multiples of the smallest power of two that allows them,
    and it [Hkv]."""
    scale = 2.0 ** np.ceil(np.log2(np.abs(keys).max(axis=(0, 2)) / 127))
    low, high = keys.min(axis=0) / scale[:, None], keys.max(axis=0) / scale[:, None]
    return np.stack([np.floor(low), np.ceil(high)], axis=1), scale


def stale_scaled_bounds(rng, layers, pages, heads, dim):
    values = rng.integers(-127, 128, (layers, pages, heads, 2, dim))
    scales = 2.0 ** rng.integers(-9, 9, (layers, pages, heads))
    return ScaledBounds(jnp.asarray(values, jnp.int8), jnp.asarray(scales, jnp.float32))


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 70), max_size=5, unique=True), seed=st.integers(0, 99))
def test_bounds_in_eight_bits_are_those_of_all_keys_at_once_however_they_came(cuts, seed):
    """Keys of very different sizes, so that a page's scale grows while it fills."""
    rng = np.random.default_rng(seed)
    table = rng.permutation(8)[:5]
    k = rng.standard_normal((70, 2, 16)) * np.exp(3 * rng.standard_normal((70, 2, 1)))
    k = k.astype(np.float32)
    edges, position = [0, *sorted(cuts), 70], np.arange(70)
    states = dict.fromkeys(IMPLEMENTATIONS, stale_scaled_bounds(rng, 2, 8, 2, 16))
    untouched = np.setdiff1d(np.arange(8), table)
    before = states["xla"]
    for begin, end in itertools.pairwise(edges):
        slots = table[position // 16] * 16 + position % 16
        slots = np.where((position >= begin) & (position < end), slots, -1).astype(np.int32)
        for implementation in IMPLEMENTATIONS:
            bounds = page_bounds(
                states[implementation], 1, jnp.asarray(k), slots, page_size=16, implementation=implementation
            )
            states[implementation] = bounds
            for page in range(-(-end // 16)):
                values, scales = eight_bits(k[16 * page : min(16 * page + 16, end)])
                np.testing.assert_array_equal(bounds.values[1, table[page]], values)
                np.testing.assert_array_equal(bounds.scales[1, table[page]], scales)
            for new, old in zip(bounds, before):
                np.testing.assert_array_equal(new[0], old[0])
                np.testing.assert_array_equal(new[1, untouched], old[1, untouched])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_eight_bits_reach_their_ends_exactly(implementation):
    edge = np.float32(127 * 2.0**-3)
    above = np.nextafter(edge, np.float32(np.inf))
    k = np.stack([np.full((2, 16), x, np.float32) for x in (edge, above, -above, 0, 1e-38)])[:, None]
    k = jnp.asarray(k.reshape(5, 2, 16))
    slots = jnp.arange(0, 80, 16, dtype=jnp.int32)
    bounds = page_bounds(
        make_bounds((1, 5, 2, 16), "int8"), 0, k, slots, page_size=16, implementation=implementation
    )
    np.testing.assert_array_equal(bounds.scales[0, :, 0], [2.0**-3, 2.0**-2, 2.0**-2, 2.0**-100, 2.0**-100])
    np.testing.assert_array_equal(bounds.values[0, :4, 0, 0, 0], [127, 63, -64, 0])
    np.testing.assert_array_equal(bounds.values[0, :4, 0, 1, 0], [127, 64, -63, 0])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_over_layers_writes_the_donated_bounds_in_place(implementation, dtype):
    shape = SHAPES["pocket_decode"]
    bounds, k, slots = make(shape)
    if dtype == "int8":
        bounds = stale_scaled_bounds(
            np.random.default_rng(0), shape.layers, shape.pages, shape.kv_heads, shape.head_dim
        )
    want = bounds
    for layer in range(shape.layers):
        want = page_bounds(
            want, layer, k * (layer + 1), jnp.asarray(slots), page_size=16, implementation="xla"
        )

    def step(bounds, k, slots):
        def one(bounds, layer):
            new = k * (layer + 1)
            return page_bounds(bounds, layer, new, slots, page_size=16, implementation=implementation), None

        return jax.lax.scan(one, bounds, jnp.arange(shape.layers))[0]

    compiled = jax.jit(step, donate_argnums=0).lower(bounds, k, slots).compile()
    # A copy of the bounds anywhere would show up as scratch memory of that size.
    whole = sum(a.nbytes for a in jax.tree.leaves(bounds))
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2
    got = compiled(jax.tree.map(jnp.copy, bounds), k, jnp.asarray(slots))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(mine, theirs)
