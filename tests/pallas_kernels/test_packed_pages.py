"""Packed pools: what the codes stand for, and attention over them against attention over what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_page_attention as lists_tests
import test_ragged_attention as ragged_tests
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_write import kv_write
from pallas_kernels.packed_pages import PackedPages, pack, unpack
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_attention.shapes import SHAPES, ListShape
from pallas_kernels.ragged_attention import ragged_attention
from pallas_kernels.ragged_attention.shapes import AttentionShape

IMPLEMENTATIONS = ["xla", "cpu"]
BITS = [8, 4]


def packed(pool, bits):
    return PackedPages(*pack(pool, bits))


def stands_for(pages, head_dim):
    return unpack(pages.codes, pages.words, pages.bits(head_dim))


def oracle(x, bits):
    """Codes, steps and lows of one vector at a time, in Python's own numbers."""

    def rounded_up(value):
        bits = int(np.float32(value).view(np.int32))
        cut = bits & ~0xFFFF
        return float(np.int32(cut + 0x10000 if bits > 0 and bits != cut else cut).view(np.float32))

    codes, steps, lows = [], [], []
    for vector in x.reshape(-1, x.shape[-1]).astype(np.float32):
        low = -rounded_up(-vector.min())
        step = rounded_up((vector.max() - np.float32(low)) * np.float32(1 / (2**bits - 1)))
        scaled = (vector - np.float32(low)) * (np.float32(1 / step) if step else np.float32(0))
        codes.append(np.clip(np.round(scaled), 0, 2**bits - 1).astype(np.uint8))
        steps.append(step)
        lows.append(low)
    return np.stack(codes), np.array(steps), np.array(lows)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift", [-300.0, -3.0, 0.0, 3.0, 300.0])
def test_packs_as_the_oracle_does(bits, shift):
    """Vectors of one sign among them, which a zero point clamped to the codes would get wrong."""
    x = np.random.default_rng(0).standard_normal((5, 3, 64)).astype(np.float32) + np.float32(shift)
    codes, words = (np.asarray(a) for a in pack(jnp.asarray(x), bits))
    want, steps, lows = oracle(x, bits)
    want = want.reshape(*x.shape[:2], 64)
    if bits == 4:
        want = want[..., :32] | want[..., 32:] << 4
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_array_equal((words & ~0xFFFF).view(np.float32).ravel(), steps)
    np.testing.assert_array_equal((words << 16).view(np.float32).ravel(), lows)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(BITS),
    size=st.floats(1e-6, 1e4),
    shift=st.floats(-1e3, 1e3),
)
def test_is_half_a_step_off_at_most(seed, bits, size, shift):
    x = (np.random.default_rng(seed).standard_normal((4, 32)) * size + shift).astype(np.float32)
    codes, words = pack(jnp.asarray(x), bits)
    error = np.abs(np.asarray(unpack(codes, words, bits)) - x)
    step = np.asarray(words & ~0xFFFF).view(np.float32)[:, None]
    # The step itself is at most 2^-7 wider than the range asks for, and the low end 2^-7 of its size lower.
    widest = ((x.max(-1) - x.min(-1)) + np.abs(x.min(-1)) / 128) / (2**bits - 1)
    assert (step[:, 0] <= widest * (1 + 1 / 64) + 1e-37).all()
    assert (error <= step / 2 + 1e-5 * np.abs(x).max()).all()


@pytest.mark.parametrize("bits", BITS)
def test_equal_channels_of_few_digits_are_exact(bits):
    x = jnp.broadcast_to(jnp.array([0.0, 1.5, -2.0, 2.0**100])[:, None], (4, 32))
    np.testing.assert_array_equal(unpack(*pack(x, bits), bits), x)


def test_other_bits_and_odd_channels_are_refused():
    with pytest.raises(ValueError, match="3 bits of 32 channels"):
        pack(jnp.zeros((2, 32)), 3)
    with pytest.raises(ValueError, match="4 bits of 33 channels"):
        pack(jnp.zeros((2, 33)), 4)
    with pytest.raises(ValueError, match="codes of 24 bytes for head dimension 64"):
        packed(jnp.zeros((1, 1, 1, 8, 24)), 8).bits(64)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_writes(bits, implementation):
    rng = np.random.default_rng(0)
    pools = [packed(jnp.zeros((2, 5, 3, 8, 32)), bits) for _ in range(2)]
    k, v = (jnp.asarray(rng.standard_normal((4, 3, 32)), jnp.float32) for _ in range(2))
    slots = jnp.array([17, -1, 8, 39])
    write = jax.jit(lambda *args: kv_write(*args, implementation=implementation))
    for got, new, old in zip(write(*pools, 1, k, v, slots), (k, v), pools):
        want = np.array(stands_for(old, 32))
        for token, slot in enumerate(slots):
            if slot >= 0:
                want[1, slot // 8, :, slot % 8] = unpack(*pack(new[token], bits), bits)
        np.testing.assert_array_equal(stands_for(got, 32), want)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("head_dim, page_size", [(32, 16), (64, 8), (96, 32), (128, 16)])
@pytest.mark.parametrize("bits", BITS)
def test_ragged_attention(bits, head_dim, page_size, window):
    shape = AttentionShape(6, 2, head_dim, page_size, ragged_tests.MIXED)
    q, k, v, *rest = ragged_tests.make(shape)
    pools = packed(k, bits), packed(v, bits)
    want = ragged_tests.oracle(q, *(stands_for(p, head_dim) for p in pools), *rest, 0.2, window)
    for implementation in IMPLEMENTATIONS:
        got = ragged_attention(q, *pools, *rest, scale=0.2, window=window, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_page_attention(bits, name):
    q, k, v, *rest = lists_tests.make(SHAPES[name])
    pools = packed(k, bits), packed(v, bits)
    dim = q.shape[2]
    want = lists_tests.oracle(q, *(stands_for(p, dim) for p in pools), *rest, 0.2)
    for implementation in IMPLEMENTATIONS:
        got = page_attention(q, *pools, *rest, scale=0.2, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_nobody_has_written_has_no_influence(bits, implementation):
    shape = ListShape(6, 2, 64, 16, (40, 3, 16, 0), 2)
    q, k, v, layer, lists, tokens = lists_tests.make(shape)
    pools = packed(k, bits), packed(v, bits)
    written = np.zeros(k.shape[:4], bool)
    for row in range(4):
        for head in range(2):
            p = np.arange(tokens[row, head])
            written[1, np.asarray(lists)[row, head, p // 16], head, p % 16] = True
    nan = np.int32(0x7FC07FC0)  # as a step and a low
    dirty = [PackedPages(pool.codes, jnp.where(written, pool.words, nan)) for pool in pools]
    clean, got = (
        page_attention(q, *p, layer, lists, tokens, scale=0.2, implementation=implementation)
        for p in (pools, dirty)
    )
    np.testing.assert_array_equal(got, clean)
