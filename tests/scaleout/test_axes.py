"""Who holds what on a mesh, without devices: every element somewhere, all shares alike, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer import LLM, load_config
from jaxinfer.engine.engine import Engine
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, MoEConfig, RopeConfig, abstract, from_hugging_face, init
from jaxinfer.quant.form import quantization
from jaxinfer.scaleout.axes import PARAMETERS, SPLIT_OVER, Axes
from jaxinfer.scaleout.mesh import spread_over

FAMILIES = Path(__file__).parents[1] / "data" / "families"
WIDE = ModelConfig(
    family="mixtral",
    vocab_size=512,
    hidden_size=256,
    layers=3,
    heads=16,
    kv_heads=8,
    head_dim=16,
    mlp_width=512,
    context_length=256,
    rope=RopeConfig(theta=10000.0, dim=16),
    moe=MoEConfig(experts=8, experts_per_token=2, width=256),
    moe_layers=(True, True, False),
)


def held(axes: Axes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """How many devices hold each element of a parameter, counted one by one."""
    parts, counts = axes.parts(name, shape), np.zeros(shape, int)
    for t in range(axes.tensor):
        for e in range(axes.expert):
            at, picked = {"tensor": (t, axes.tensor), "expert": (e, axes.expert)}, []
            for part in parts:
                place = 0
                for axis in part.split.names:
                    place = place * at[axis][1] + at[axis][0]
                runs = part.runs[place]
                picked.append(np.concatenate([np.arange(*run) for run in runs]))
            counts[np.ix_(*picked)] += 1
            assert tuple(map(len, picked)) == tuple(part.share for part in parts)
    return counts


def parameters(config: ModelConfig):
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config)):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def bytes_of_one(axes: Axes) -> int:
    shares = ((axes.parts(name, leaf.shape), leaf) for name, leaf in parameters(axes.config))
    return sum(math.prod(part.share for part in parts) * leaf.dtype.itemsize for parts, leaf in shares)


@pytest.mark.parametrize("mode", ["", "atom-w4a4", "atom-w4a8", "w8a8", "w4a16"])
@pytest.mark.parametrize("shape", [(2, 1), (1, 4), (2, 2), (8, 1), (2, 4), (16, 1)], ids=str)
def test_everything_is_somewhere_and_what_is_large_is_there_once(shape, mode):
    config = dataclasses.replace(WIDE, quantization=quantization(mode, WIDE) if mode else None)
    axes = Axes(config, *shape)
    for name, leaf in parameters(config):
        counts = held(axes, name, leaf.shape)
        assert counts.min() >= 1, name
        small = name.endswith(("norm.scale", "router", "order"))
        twice = "qkv" in name and shape == (16, 1)  # two devices to a KV head: its key and value are on both
        assert small or twice or counts.max() == 1, name


@pytest.mark.parametrize("mode", ["", "atom-w4a8"])
@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (8, 1), (1, 8), (2, 2), (4, 2)], ids=str)
def test_shares_are_within_five_percent_of_an_even_split(shape, mode):
    config = dataclasses.replace(
        WIDE, hidden_size=1024, mlp_width=2048, moe=MoEConfig(experts=8, experts_per_token=2, width=1024)
    )
    config = dataclasses.replace(config, quantization=quantization(mode, config) if mode else None)
    whole, share = bytes_of_one(Axes(config, 1, 1)), bytes_of_one(Axes(config, *shape))
    assert share <= 1.05 * whole / math.prod(shape)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(path.name for path in FAMILIES.iterdir() if path.is_dir())), st.data())
def test_every_family_divides_or_says_why_not(case, data):
    config = from_hugging_face(json.loads((FAMILIES / case / "config.json").read_text()))
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    try:
        axes = Axes(config, *shape)
    except ConfigError as error:
        assert "engine.mesh: " in str(error) and "accepted: " in str(error)
        return
    for name, leaf in parameters(config):
        assert held(axes, name, leaf.shape).min() >= 1


def test_the_tables_name_only_parameters_that_there_are():
    names = {name.split(".", 2)[-1] if name.startswith("runs") else name for name, _ in parameters(WIDE)}
    plain = {"moe." + name.removeprefix("mlp.") for name in names} | names
    biased = {"attention.qkv_bias", "attention.q_norm", "attention.k_norm", "mlp.gate_up_bias", "head_bias"}
    assert set(PARAMETERS) <= plain | biased
    assert set(SPLIT_OVER) >= {"heads", "kv_heads", "vocabulary", "width", "experts"}


@pytest.mark.parametrize(
    "mesh, said",
    [
        ("{tensor=3}", ["tensor = 3", "16 query heads on 8 KV heads", "accepted: 1, 2, 4, 8, 16"]),
        ("{expert=16}", ["expert = 16", "more than the model's 8 experts", "accepted: 1, 2, 4, 8"]),
        ("{expert=3}", ["expert = 3", "does not divide the model's 8 experts"]),
        ("{tensor=4, expert=2}", ["tensor * expert = 8 devices; there are 1", "device_count=8"]),
    ],
)
def test_meshes_that_cannot_be_are_refused_by_name(mesh, said):
    with pytest.raises(ConfigError) as caught:
        spread_over(WIDE, load_config(None, [f"engine.mesh={mesh}"]))
    for words in said:
        assert words in str(caught.value)


def test_experts_are_for_models_that_have_some():
    dense = dataclasses.replace(WIDE, moe=None, moe_layers=())
    with pytest.raises(ConfigError, match="expert = 2: the model has no experts"):
        Axes(dense, 1, 2)


def test_devices_of_different_kinds_are_refused(monkeypatch):
    class Device:
        platform = "gpu"

        def __init__(self, kind):
            self.device_kind = kind

    kinds = ["NVIDIA H200", "NVIDIA H200", "NVIDIA L4"]
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(kind) for kind in kinds])
    dense = dataclasses.replace(WIDE, heads=12, kv_heads=6)
    with pytest.raises(ConfigError, match="different kinds, NVIDIA H200 and NVIDIA L4"):
        spread_over(dense, load_config(None, ["engine.mesh={tensor=3}"]))


@pytest.mark.parametrize(
    "text, said",
    [
        ("engine.mesh=4", "a table"),
        ("engine.mesh={tensor=0}", "whole numbers from 1 on"),
        ("engine.mesh={tensor=true}", "such as {tensor = 4}"),
        ("engine.mesh={data=2}", "a table of tensor and expert"),
    ],
)
def test_settings_say_what_a_mesh_is(text, said):
    with pytest.raises(ConfigError, match=said):
        load_config(None, [text])


def test_a_mesh_takes_all_experts_or_none():
    both = load_config(None, ["engine.mesh={tensor=1}", "offload.device_memory=1GiB"])
    with pytest.raises(ConfigError, match=r"offload\.device_memory does not go with engine.mesh"):
        LLM(config=both)


def test_an_engine_is_not_given_a_model_on_one_device():
    model = init(WIDE, jax.random.key(0))
    with pytest.raises(ConfigError, match="lies on one device"):
        Engine(WIDE, model, load_config(None, ["engine.mesh={tensor=2}"]))
