"""Calibration of whole layers: orders, second moments, folding, and what a quantized model still says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_form import NARROW

from jaxinfer.errors import ConfigError, ModelError
from jaxinfer.models import forward, init, logits, unstack
from jaxinfer.models.attention import qkv
from jaxinfer.models.norms import norm
from jaxinfer.quant.calibrate import arrange, quantize_layers
from jaxinfer.quant.form import quantization
from jaxinfer.quant.model import quantize_model
from jaxinfer.quant.step import Step, attend_causally
from jaxinfer.quant.text import encode, windows

WINDOWS = np.random.default_rng(3).integers(0, 97, (4, 48)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    made = unstack(init(NARROW, jax.random.key(1)), NARROW)
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, made)


def as_numpy(layer):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), layer)


def all_logits(model, config, ids):
    at = jnp.arange(len(ids))
    hidden, _ = forward(model, config, ids, at, jnp.full(len(ids), len(ids)), attend_causally, None)
    return np.asarray(logits(model, config, hidden))


def test_statistics_are_those_of_the_inputs(model):
    layer = as_numpy(model.runs[1][0])
    hidden = np.random.default_rng(0).standard_normal((48, 128)).astype(np.float32)
    step = Step(NARROW, 48)
    got = step.statistics(layer, hidden, 1)
    x = np.asarray(norm(hidden, layer.attn_norm, NARROW))
    np.testing.assert_allclose(got["attention.qkv"], [(x**2).sum(0), np.abs(x).sum(0)], rtol=1e-5)
    q, k, v = qkv(jnp.asarray(x), layer.attention, NARROW, step.angles)
    out = np.asarray(attend_causally(None, 0, q, k, v, 0)[0]).reshape(48, -1)
    np.testing.assert_allclose(got["attention.out"][0], (out**2).sum(0), rtol=1e-4)


def test_experts_see_the_tokens_they_receive(model):
    """Second moments of every expert against a loop over tokens."""
    layer = as_numpy(model.runs[0][0])
    hidden = np.random.default_rng(0).standard_normal((48, 128)).astype(np.float32)
    form = quantization("w4a16", NARROW)  # inputs are not rounded
    step = Step(NARROW, 48)
    noted = step.moments(layer, hidden, 0, {}, form)
    x = np.asarray(norm(hidden, layer.attn_norm, NARROW))
    q, k, v = qkv(jnp.asarray(x), layer.attention, NARROW, step.angles)
    attended = np.asarray(attend_causally(None, 0, q, k, v, 0)[0]).reshape(48, -1)
    hidden = hidden + attended @ layer.attention.out.reshape(-1, 128)
    x = np.asarray(norm(hidden, layer.mlp_norm, NARROW))
    chosen = np.argsort(-(x @ layer.mlp.router), axis=1)[:, :2]
    for expert in range(4):
        mine = x[(chosen == expert).any(1)]
        np.testing.assert_allclose(noted["mlp.gate_up"][expert], mine.T @ mine, rtol=1e-3, atol=1e-2)
        gate, up = (mine @ layer.mlp.gate_up[expert, :, i] for i in (0, 1))
        inner = gate / (1 + np.exp(-gate)) * up
        np.testing.assert_allclose(noted["mlp.down"][expert], inner.T @ inner, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("which", [0, 1])
def test_folding_the_order_of_down_changes_nothing(model, which):
    layer = as_numpy(model.runs[which][0])
    rng = np.random.default_rng(0)
    width = layer.mlp.down.shape[-2]
    lead = layer.mlp.down.shape[:-2]
    order = np.stack([rng.permutation(width) for _ in range(int(np.prod(lead)))]).reshape(*lead, width)
    form = quantization("atom-w4a4", NARROW)
    hidden = rng.standard_normal((48, 128)).astype(np.float32)
    step = Step(NARROW, 48)
    folded = arrange(layer, {"mlp.down": order}, form)
    np.testing.assert_allclose(
        step.run(folded, hidden, which), step.run(layer, hidden, which), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("mode", "chosen", "least"),
    [
        ("w8a8", {}, 0.999),
        ("atom-w4a8", {}, 0.98),
        ("atom-w4a8", {"rotate": True}, 0.98),
        ("atom-w4a4", {}, 0.9),
        ("w4a16", {}, 0.9),
    ],
)
def test_a_quantized_model_says_nearly_the_same(model, mode, chosen, least):
    form = quantization(mode, NARROW, **chosen)
    config, quantized, reports = quantize_model(model, NARROW, form, WINDOWS)
    assert [report.index for report in reports] == [0, 1]
    assert all(0 <= report.drift < 0.5 for report in reports)
    ids = WINDOWS[0]
    same = np.corrcoef(all_logits(model, NARROW, ids).ravel(), all_logits(quantized, config, ids).ravel())[
        0, 1
    ]
    assert same > least


def test_channels_that_stick_out_are_kept_apart(model):
    """A norm's channel scaled up and the next weights down: the same function, until it is rounded."""
    planted = jax.tree.map(lambda leaf: leaf, model)
    for run in planted.runs:
        attention, scale = run[0].attention, run[0].attn_norm.scale
        run[0].attn_norm.scale = scale.at[17].multiply(60.0)
        attention.qkv = attention.qkv.at[17].divide(60.0)
    ids = WINDOWS[0]
    plain = all_logits(planted, NARROW, ids)
    np.testing.assert_allclose(plain, all_logits(model, NARROW, ids), rtol=1e-3, atol=1e-3)
    errors = {}
    for outliers in (0, 16):
        form = quantization("atom-w4a4", NARROW, method="rtn", group=0, outliers=outliers)
        config, quantized, reports = quantize_model(planted, NARROW, form, WINDOWS)
        errors[outliers] = np.square(all_logits(quantized, config, ids) - plain).mean()
    assert errors[16] < 0.2 * errors[0]
    assert reports[0].matrices[0].outlier_share > 0.9


def test_weights_that_are_no_numbers_are_named(model):
    broken = as_numpy(model.runs[0][0])
    broken.mlp.down = broken.mlp.down.copy()
    broken.mlp.down[1, 2, 3] = np.nan
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down: holds NaN"):
        list(
            quantize_layers(NARROW, quantization("w8a8", NARROW), np.zeros((97, 128)), [broken], WINDOWS[:0])
        )


def test_inputs_that_are_no_numbers_are_named(model):
    embedding = np.array(model.embed, np.float32)
    embedding[WINDOWS[0, 5], 7] = np.nan
    form = quantization("atom-w4a8", NARROW)
    layers = [as_numpy(run[0]) for run in model.runs]
    with pytest.raises(ModelError, match=r"layers\.0\.attention\.\w+: .* NaN or too large .* embed"):
        list(quantize_layers(NARROW, form, embedding, layers, WINDOWS))


def test_windows_of_text():
    form = dataclasses.replace(quantization("atom-w4a4", NARROW), samples=3, length=100)
    ids = np.arange(1000)
    assert windows(ids, form, 50).shape == (3, 50)
    assert windows(ids, form, 4096).shape == (3, 100)
    np.testing.assert_array_equal(windows(ids, form, 4096), windows(ids, form, 4096))
    assert windows(ids[:250], form, 4096).tolist() == [list(range(100)), list(range(100, 200))]
    assert windows(ids[:70], form, 4096).shape == (1, 70)
    one = dataclasses.replace(form, samples=1)
    assert windows(ids[:70], one, 4096).tolist() == [list(range(70))]
    assert windows(ids[:100], one, 4096).tolist() == [list(range(100))]
    with pytest.raises(ConfigError, match="63 tokens; at least 64"):
        windows(ids[:63], form, 4096)
    with pytest.raises(ConfigError, match="is empty"):
        encode(" \n", list)
