"""Keys scaled down and queries up: the same scores, and less spoilt by 4 bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_form import NARROW

from jaxinfer.models import init, rotary, unstack
from jaxinfer.models.attention import qkv
from jaxinfer.models.config import RopeConfig
from jaxinfer.models.norms import normed
from jaxinfer.quant.form import quantization
from jaxinfer.quant.model import quantize_model
from jaxinfer.quant.smoothing import key_scales, smoothed
from jaxinfer.quant.step import Step
from pallas_kernels.packed_pages import pack, unpack

CONFIGS = {
    "plain": NARROW,
    "biased": dataclasses.replace(NARROW, qkv_bias=True),
    "normed heads": dataclasses.replace(NARROW, qk_norm="head"),
    "normed whole": dataclasses.replace(NARROW, qk_norm="full"),
    "half rotated": dataclasses.replace(NARROW, rope=RopeConfig(theta=1e4, dim=16)),
}


def layer_with_large_keys(config):
    """Two channels of the keys that stick out by 20, and two that are always zero; a hidden state to run it on."""
    layer = jax.tree.map(np.array, unstack(init(config, jax.random.key(1)), config).runs[0][0])
    attention = layer.attention
    attention.qkv = attention.qkv * 5
    keys = attention.qkv[:, :, -2] if attention.k_norm is None else attention.k_norm
    keys[..., [3, 20]] *= 20
    keys[..., [7, 23]] = 0
    if attention.qkv_bias is not None:
        attention.qkv_bias = np.random.default_rng(2).standard_normal(attention.qkv_bias.shape, np.float32)
    return layer, np.random.default_rng(0).standard_normal((48, 128)).astype(np.float32)


def scores(q, k):
    return np.einsum("thgd,shd->hgts", np.asarray(q).reshape(len(k), k.shape[1], -1, k.shape[2]), k)


def queries_and_keys(layer, hidden, config):
    at = rotary.angles(config.rope, jnp.arange(len(hidden)), jnp.full(len(hidden), len(hidden)))
    return qkv(normed(hidden, layer.attn_norm, config), layer.attention, config, at)[:2]


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_stay_and_are_less_spoilt(name):
    config = CONFIGS[name]
    layer, hidden = layer_with_large_keys(config)
    q, k = queries_and_keys(layer, hidden, config)
    np.testing.assert_allclose(Step(config, 48).keys(layer, hidden), k, rtol=1e-3, atol=1e-4)
    scales = key_scales(np.asarray(k), config)
    assert scales.shape == k.shape[1:] and np.isfinite(scales).all()
    half = config.rope.dim // 2
    np.testing.assert_array_equal(scales[:, :half], scales[:, half : 2 * half])
    smooth_q, smooth_k = queries_and_keys(smoothed(layer, scales), hidden, config)
    want = scores(q, k)
    np.testing.assert_allclose(scores(smooth_q, smooth_k), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    rounded = [unpack(*pack(keys, 4), 4) for keys in (k, smooth_k)]
    spoilt = [np.square(scores(*pair) - want).sum() for pair in zip((q, smooth_q), rounded)]
    assert spoilt[1] < 0.7 * spoilt[0]


def test_a_scale_is_the_root_of_a_channels_size():
    k = np.random.default_rng(0).standard_normal((5, 2, 32)).astype(np.float32)
    got = key_scales(k, dataclasses.replace(NARROW, rope=RopeConfig(theta=1e4, dim=16)))
    for head in range(2):
        size = [np.sqrt(np.square(k[:, head, c]).mean()) for c in range(32)]
        for c in range(8):
            size[c] = size[c + 8] = np.sqrt((size[c] ** 2 + size[c + 8] ** 2) / 2)
        np.testing.assert_allclose(got[head], np.sqrt(size / np.prod(size) ** (1 / 32)), rtol=1e-5)


def test_clipped_keys_are_left_alone():
    k = np.random.default_rng(0).standard_normal((8, 2, 32)) * np.linspace(1, 50, 32)
    assert (key_scales(k, dataclasses.replace(NARROW, clip_qkv=8.0)) == 1).all()


def test_is_part_of_calibration():
    config = dataclasses.replace(NARROW, moe=None, moe_layers=())
    model = unstack(init(config, jax.random.key(1)), config)
    for run in model.runs:
        for layer in run:
            layer.attention.qkv = (layer.attention.qkv * 5).at[:, :, -2, [3, 19]].multiply(20)
    windows = np.random.default_rng(3).integers(0, 97, (4, 48)).astype(np.int32)
    spread, drift = {}, {}
    for smooth in (False, True):
        form = quantization("w8a8", config, smooth_keys=smooth)
        quantized_config, quantized, reports = quantize_model(model, config, form, windows)
        keys = Step(quantized_config, 48).keys(quantized.runs[0][0], model.embed[windows[0]])
        size = np.sqrt(np.square(np.asarray(keys)).mean(0))
        spread[smooth], drift[smooth] = size.max() / np.median(size), reports[-1].drift
    assert spread[False] > 10 and spread[True] < 0.6 * spread[False]
    assert drift[True] < max(1.5 * drift[False], 0.01)
