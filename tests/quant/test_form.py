"""What can be quantized and how: settings, limits, sizes."""

import dataclasses

import jax
import pytest

from jaxinfer.config import load_config
from jaxinfer.engine.memory import weight_bytes
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, MoEConfig, RopeConfig, abstract, init
from jaxinfer.models.serialized import form_from_json, form_to_json
from jaxinfer.quant.form import MODES, matrices, quantization

NARROW = ModelConfig(
    family="mixtral",
    vocab_size=97,
    hidden_size=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp_width=256,
    context_length=256,
    rope=RopeConfig(theta=1e4, dim=32),
    dtype="float32",
    moe=MoEConfig(experts=4, experts_per_token=2, width=128),
    moe_layers=(True, False),
)
LLAMA2_7B = dataclasses.replace(
    NARROW, hidden_size=4096, heads=32, kv_heads=32, head_dim=128, mlp_width=11008, moe=None, moe_layers=()
)


def test_the_papers_constants():
    form = quantization("atom-w4a4", LLAMA2_7B)
    assert (form.group, form.outliers, form.rows, form.outlier_bits) == (128, 128, 2, 8)
    assert (form.activation_clip, form.weight_clip, form.damping, form.method) == (0.9, 0.85, 0.01, "gptq")
    assert (form.samples, form.length, form.seed, form.statistic) == (128, 2048, 0, "squares")


def test_a_clip_for_narrow_groups_is_searched():
    assert quantization("atom-w4a4", NARROW).weight_clip == 0
    assert quantization("atom-w4a4", NARROW, weight_clip=0.85).weight_clip == 0.85
    assert quantization("atom-w4a4", NARROW, group=0).weight_clip == 0.85


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_fits_narrow_models_and_survives_json(mode):
    form = quantization(mode, NARROW)
    assert form_from_json(form_to_json(form)) == form
    config = dataclasses.replace(NARROW, quantization=form)
    model, shapes = init(config, jax.random.key(0)), abstract(config)
    assert jax.tree.structure(model) == jax.tree.structure(shapes)
    made, described = ([(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in (model, shapes))
    assert made == described
    assert weight_bytes(config, "float32") == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert model.runs[0].mlp.gate_up.shape == (1, 4, 128, 2, 128)


@pytest.mark.parametrize(
    ("mode", "most"), [("atom-w4a4", 0.29), ("atom-w4a8", 0.29), ("w4a16", 0.29), ("w8a8", 0.51)]
)
def test_sizes_of_linear_layers(mode, most):
    config = dataclasses.replace(LLAMA2_7B, quantization=quantization(mode, LLAMA2_7B))
    layer = abstract(config).runs[0]
    packed = [layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down]
    weights = sum(array.size for array in packed)
    assert weights == 2 * sum(ins * outs for ins, outs in matrices(LLAMA2_7B).values())
    assert sum(array.nbytes for array in packed) / (2 * weights) <= most


@pytest.mark.parametrize(
    ("mode", "chosen", "said"),
    [
        ("atom-w3a3", {}, "'atom-w3a3' is not known; accepted: atom-w4a4"),
        ("atom-w4a4", {"group": 48}, "group = 48: attention.qkv has 128 input channels, 80 without its 48"),
        ("atom-w4a4", {"group": 24}, "group = 24 is not accepted; it must be 0 or a multiple of 16"),
        ("atom-w4a4", {"outliers": 128}, "outliers = 128: attention.qkv has 128 input channels; fewer"),
        ("atom-w4a4", {"rows": 3}, "rows = 3"),
        ("atom-w4a4", {"rotate": True, "reorder": True}, "reorder = True .* false where inputs are rotated"),
        ("w8a8", {"outliers": 16}, "outliers = 16 .* 0 where all weights have 8 bits"),
        ("atom-w4a8", {"group": 0}, "two_level"),
        ("atom-w4a4", {"damping": 0.0}, "damping"),
    ],
)
def test_what_cannot_be(mode, chosen, said):
    with pytest.raises(ConfigError, match=said):
        quantization(mode, NARROW, **chosen)


def test_settings_are_those_of_the_form():
    settings = load_config(None, ["quantization.group=32", "quantization.method=rtn"]).quantization
    form = quantization("atom-w4a4", NARROW, **settings.chosen)
    assert (form.group, form.method, form.outliers) == (32, "rtn", 32)
    names = {field.name for field in dataclasses.fields(form)}
    assert {field.name for field in dataclasses.fields(settings)} - {"mode"} <= names
    with pytest.raises(ConfigError, match=r"quantization\.method"):
        load_config(None, ["quantization.method=best"])
