"""Rotary embedding: kinds that stretch with the length, and what that means for shared prefixes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.models import RopeConfig, rotary

PLAIN = RopeConfig(theta=10000.0, dim=8)
KINDS = {
    "default": PLAIN,
    "linear": dataclasses.replace(PLAIN, kind="linear", factor=4.0),
    "dynamic": dataclasses.replace(PLAIN, kind="dynamic", factor=4.0, original_context=16),
    "llama3": dataclasses.replace(PLAIN, kind="llama3", factor=8.0, original_context=16),
    "yarn": dataclasses.replace(PLAIN, kind="yarn", factor=4.0, original_context=16),
    "longrope": dataclasses.replace(
        PLAIN,
        kind="longrope",
        factor=4.0,
        original_context=16,
        short_factor=(1.0, 1.1, 1.3, 1.6),
        long_factor=(1.2, 2.0, 3.5, 6.0),
        short_mscale=1.1,
        long_mscale=1.4,
    ),
}
angles = jax.jit(rotary.angles, static_argnums=0)


def turn(rope, positions, length):
    """cos, sin [T, dim // 2]; padded to one shape, so that property tests compile once a kind."""
    count = len(positions)
    length = np.broadcast_to(np.asarray(length, np.int32), count)
    padded = [np.pad(np.asarray(a, np.int32), (0, 64 - count)) for a in (positions, length)]
    cos, sin = angles(rope, *padded)
    return np.asarray(cos)[:count], np.asarray(sin)[:count]


def expected(rope, positions, frequencies, scale=1.0):
    turns = np.outer(positions, frequencies)
    return scale * np.cos(turns), scale * np.sin(turns)


def plain_frequencies(theta, dim=8):
    return theta ** -(np.arange(0, dim, 2) / dim)


def test_rotation_is_a_complex_product_of_channel_pairs():
    x = np.random.default_rng(0).normal(size=(5, 3, 12)).astype(np.float32)
    positions = np.arange(5, dtype=np.int32)
    turned = np.asarray(rotary.rotate(jnp.asarray(x), rotary.angles(PLAIN, positions, positions + 1)))
    pairs = x[..., :4] + 1j * x[..., 4:8]
    product = pairs * np.exp(1j * np.outer(positions, plain_frequencies(10000.0)))[:, None]
    np.testing.assert_allclose(turned[..., :4], product.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 4:8], product.imag, atol=1e-5)
    np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])  # beyond the rotated channels


@pytest.mark.parametrize("length", [5, 16, 17, 40, 64])
def test_dynamic_base_follows_the_governing_length(length):
    growth = max(1.0, 4.0 * length / 16 - 3.0)
    frequencies = plain_frequencies(10000.0 * growth ** (8 / 6))
    got = turn(KINDS["dynamic"], np.arange(64), length)
    np.testing.assert_allclose(got, expected(None, np.arange(64), frequencies), atol=1e-4)


@pytest.mark.parametrize(("length", "factors", "scale"), [(16, "short", 1.1), (17, "long", 1.4)])
def test_longrope_changes_factors_and_scale_beyond_the_original_context(length, factors, scale):
    rope = KINDS["longrope"]
    frequencies = plain_frequencies(10000.0) / np.asarray(getattr(rope, f"{factors}_factor"))
    got = turn(rope, np.arange(17), length)
    np.testing.assert_allclose(got, expected(None, np.arange(17), frequencies, scale), atol=1e-5)


def test_longrope_scale_is_derived_from_the_stretch():
    rope = dataclasses.replace(KINDS["longrope"], short_mscale=None, long_mscale=None)
    cos, _ = turn(rope, [0], 1)
    np.testing.assert_allclose(cos, np.sqrt(1 + np.log(4.0) / np.log(16.0)), rtol=1e-6)
    cos, _ = turn(dataclasses.replace(rope, attention_factor=1.25), [0], 1)
    np.testing.assert_allclose(cos, 1.25)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    frequencies, scale = rotary.fixed_frequencies(KINDS["llama3"])
    plain = plain_frequencies(10000.0)
    assert scale == 1.0
    assert frequencies[3] == pytest.approx(plain[3] / 8)  # wavelength 6283, far beyond 16 tokens
    assert plain[0] / 8 < frequencies[0] < plain[0]  # wavelength 6.28, between 16 / 4 and 16 / 1
    short = dataclasses.replace(KINDS["llama3"], original_context=64)
    assert rotary.fixed_frequencies(short)[0][0] == pytest.approx(plain[0])  # now below 64 / 4


def test_yarn_keeps_fast_channels_stretches_slow_ones_and_scales_by_the_stretch():
    rope = dataclasses.replace(KINDS["yarn"], dim=64, original_context=4096)
    frequencies, scale = rotary.fixed_frequencies(rope)
    plain = plain_frequencies(10000.0, 64)
    np.testing.assert_allclose(frequencies[:8], plain[:8], rtol=1e-6)
    np.testing.assert_allclose(frequencies[-8:], plain[-8:] / 4, rtol=1e-6)
    assert scale == pytest.approx(0.1 * np.log(4.0) + 1)
    assert rotary.fixed_frequencies(dataclasses.replace(rope, attention_factor=0.5))[1] == 0.5


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 48), st.integers(0, 6), st.data())
def test_a_token_turns_the_same_whatever_else_is_in_the_step(kind, prompt, answer, data):
    """One piece against any cut of the same sequence, with tokens of another sequence beside it."""
    rope = KINDS[kind]
    positions = np.arange(prompt + answer)
    lengths = np.maximum(prompt, positions + 1)
    whole = turn(rope, positions, lengths)
    cut = data.draw(st.integers(0, prompt + answer))
    mixed = turn(rope, np.r_[positions[cut:], 3, 30], np.r_[lengths[cut:], 4, 31])
    for one, other in zip(whole, mixed):
        np.testing.assert_allclose(one[cut:], other[:-2], atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 48), st.integers(1, 48))
def test_prompts_of_one_namespace_share_their_keys(kind, one, other):
    rope = KINDS[kind]
    same_namespace = rotary.prefix_namespace(rope, one) == rotary.prefix_namespace(rope, other)
    positions = np.arange(min(one, other))
    same_keys = np.allclose(turn(rope, positions, one), turn(rope, positions, other), atol=1e-6)
    if same_namespace:
        assert same_keys
    elif len(positions) > 1:
        assert not same_keys


@pytest.mark.parametrize("kind", KINDS)
def test_only_longrope_computes_its_keys_anew_at_the_original_context(kind):
    assert rotary.restarts_at(KINDS[kind]) == (16 if kind == "longrope" else None)
