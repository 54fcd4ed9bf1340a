"""hybrid_matmul against the oracles of its parts, and its Hopper kernel against theirs in the simulator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_int4_matmul as low_bits
import test_page_attention as page_tests

from pallas_kernels._mosaic import simulator
from pallas_kernels._teams import launch_teams
from pallas_kernels.hybrid_matmul import hybrid_matmul
from pallas_kernels.hybrid_matmul.shapes import SIMULATED
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.packed_pages import PackedPages, pack
from pallas_kernels.page_attention import page_attention


def make_product(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    sizes = (shape.rows, shape.inputs), (shape.inputs, shape.outputs)
    return tuple(jnp.asarray(rng.standard_normal(size), dtype) for size in sizes)


def make_attention(shape, dtype):
    args = page_tests.make(dataclasses.replace(shape, tokens=shape.tokens or (1,)), dtype)
    rows = len(shape.tokens)
    return (args[0][:rows], *args[1:4], args[4][:rows], args[5][:rows])


def check(args, got, tolerance):
    x, w, *attention = args
    product = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    for value, want in zip(got, (product, page_tests.oracle(*attention, 0.2))):
        np.testing.assert_allclose(np.asarray(value, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SIMULATED)
def test_without_a_gpu_the_parts_run_in_sequence(name):
    shape = SIMULATED[name]
    args = make_product(shape.product, jnp.float32) + make_attention(shape.attention, jnp.float32)
    check(args, hybrid_matmul(*args, scale=0.2), 1e-4)


@pytest.mark.parametrize("name", [name for name in SIMULATED if name != "nothing"])
def test_the_kernel_gives_what_the_two_kernels_give(name):
    """Bit for bit, with races looked for."""
    from pallas_kernels.hybrid_matmul import mosaic_gpu

    shape = SIMULATED[name]
    args = make_product(shape.product, jnp.bfloat16) + make_attention(shape.attention, jnp.bfloat16)
    with simulator():
        got = jax.block_until_ready(hybrid_matmul(*args, scale=0.2, implementation="mosaic_gpu"))
        if shape.product.rows:
            (alone,) = launch_teams((mosaic_gpu.product(*args[:2], shape.attention.page_size),), "product")
            np.testing.assert_array_equal(got[0], alone)
        if shape.attention.tokens:
            alone = page_attention(*args[2:], scale=0.2, implementation="mosaic_gpu")
            np.testing.assert_array_equal(got[1], alone)
    check(args, got, 3e-2)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("both", "w4a4"), *((name, "w4a8") for name in ("chosen", "product_alone", "attention_alone"))],
)
def test_low_bits_beside_packed_pages(name, mode):
    """A product of packed weights and attention over INT4 keys and values, bit for bit those of their own kernels."""
    shape = SIMULATED[name]
    x, w, _, _ = jax.tree.map(jnp.asarray, low_bits.draw(shape.product, mode))
    attention = dataclasses.replace(shape.attention, head_dim=128)
    q, *pools, layer, lists, tokens = make_attention(attention, jnp.bfloat16)
    pools = [PackedPages(*pack(pool.astype(jnp.float32), 4)) for pool in pools]
    with simulator():
        got = jax.block_until_ready(
            hybrid_matmul(x, w, q, *pools, layer, lists, tokens, scale=0.2, implementation="mosaic_gpu")
        )
        if shape.product.rows:
            want = int4_matmul(x, w, implementation="mosaic_gpu")
            np.testing.assert_array_equal(got[0], want.astype(q.dtype))
        if shape.attention.tokens:
            want = page_attention(q, *pools, layer, lists, tokens, scale=0.2, implementation="mosaic_gpu")
            np.testing.assert_array_equal(got[1], want)


@pytest.mark.parametrize("name", ["chosen", "queues"])
def test_a_plain_product_beside_packed_pages(name):
    shape = SIMULATED[name]
    x, w = make_product(shape.product, jnp.bfloat16)
    q, *pools, layer, lists, tokens = make_attention(shape.attention, jnp.bfloat16)
    pools = [PackedPages(*pack(pool.astype(jnp.float32), 8)) for pool in pools]
    with simulator():
        got = jax.block_until_ready(
            hybrid_matmul(x, w, q, *pools, layer, lists, tokens, scale=0.2, implementation="mosaic_gpu")
        )
        want = page_attention(q, *pools, layer, lists, tokens, scale=0.2, implementation="mosaic_gpu")
        np.testing.assert_array_equal(got[1], want)
    product = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(np.asarray(got[0], np.float64), product, rtol=3e-2, atol=3e-2)


def test_limits():
    shape = SIMULATED["both"]
    x, w = make_product(shape.product, jnp.bfloat16)
    attention = make_attention(shape.attention, jnp.bfloat16)

    def call(x, w, pace=1.0):
        return hybrid_matmul(x, w, *attention, scale=0.2, pace=pace, implementation="mosaic_gpu")

    with pytest.raises(NotImplementedError, match="256 by 250; multiples of 32 and 128"), simulator():
        call(x, w[:, :250])
    with pytest.raises(NotImplementedError, match="float32 by bfloat16; bfloat16"), simulator():
        call(x.astype(jnp.float32), w)
    with pytest.raises(ValueError, match=r"hybrid_matmul: pace 0\.5; 1 or more"), simulator():
        call(*jax.tree.map(jnp.asarray, low_bits.draw(shape.product, "w4a8"))[:2], 0.5)
    with pytest.raises(NotImplementedError, match="H200"):
        call(x, w)
