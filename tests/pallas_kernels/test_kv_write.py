"""kv_write against plain numpy, in place under jit and scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_write import kv_write
from pallas_kernels.kv_write.shapes import SHAPES

IMPLEMENTATIONS = ["xla", "cpu"]


def make(rng, shape, dtype=jnp.float32):
    pool = (shape.layers, shape.pages, shape.kv_heads, shape.page_size, shape.head_dim)
    new = (shape.tokens, shape.kv_heads, shape.head_dim)
    k_pages, v_pages = (jnp.asarray(rng.standard_normal(pool, np.float32), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal(new, np.float32)) for _ in range(2))
    slots = rng.permutation(shape.pages * shape.page_size)[: shape.tokens].astype(np.int32)
    return k_pages, v_pages, k, v, np.where(rng.random(shape.tokens) < 0.2, -1, slots)


def oracle(pool, layer, new, slots):
    pool = np.array(pool)
    for token, slot in enumerate(slots):
        if slot >= 0:
            pool[layer, slot // pool.shape[3], :, slot % pool.shape[3]] = np.asarray(
                new[token].astype(pool.dtype)
            )
    return pool


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "pocket_decode"])
def test_matches_numpy(name, dtype, implementation):
    k_pages, v_pages, k, v, slots = make(np.random.default_rng(0), SHAPES[name], jnp.dtype(dtype))
    layer = SHAPES[name].layers - 1
    got = kv_write(k_pages, v_pages, layer, k, v, slots, implementation=implementation)
    np.testing.assert_array_equal(got[0], oracle(k_pages, layer, k, slots))
    np.testing.assert_array_equal(got[1], oracle(v_pages, layer, v, slots))


@settings(max_examples=25, deadline=None)
@given(
    slots=st.lists(st.integers(0, 71), min_size=17, max_size=17, unique=True), skip=st.integers(0, 2**17 - 1)
)
def test_any_slots(slots, skip):
    slots = np.array([-1 - i if skip >> i & 1 else s for i, s in enumerate(slots)], np.int32)
    k_pages, v_pages, k, v, _ = make(np.random.default_rng(1), SHAPES["tiny"])
    for implementation in IMPLEMENTATIONS:
        got = kv_write(k_pages, v_pages, 1, k, v, slots, implementation=implementation)
        np.testing.assert_array_equal(got[0], oracle(k_pages, 1, k, slots))
        np.testing.assert_array_equal(got[1], oracle(v_pages, 1, v, slots))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_over_layers_writes_the_donated_pool_in_place(implementation):
    shape = SHAPES["pocket_decode"]
    k_pages, v_pages, k, v, slots = make(np.random.default_rng(2), shape)
    want = np.array(k_pages)
    for layer in range(shape.layers):
        want = oracle(want, layer, k * (layer + 1), slots)

    def step(k_pages, v_pages, k, v, slots):
        def one_layer(pools, layer):
            return kv_write(*pools, layer, k * (layer + 1), v, slots, implementation=implementation), None

        return jax.lax.scan(one_layer, (k_pages, v_pages), jnp.arange(shape.layers))[0]

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(k_pages, v_pages, k, v, slots).compile()
    # A copy of one pool anywhere would show up as scratch memory of that size.
    assert compiled.memory_analysis().temp_size_in_bytes < k_pages.nbytes / 2
    pool_copy = [
        line for line in compiled.as_text().splitlines() if " copy(" in line and str(shape.pages) in line
    ]
    assert not pool_copy
    # Arrays that borrow numpy's memory cannot be donated; sums own theirs.
    k_pages, v_pages = k_pages + 0, v_pages + 0
    address = k_pages.unsafe_buffer_pointer()
    got, _ = compiled(k_pages, v_pages, k, v, slots)
    assert got.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(got, want)
