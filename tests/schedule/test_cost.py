"""Seconds of requests and steps, against the published formulae, numbers and brute force."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.attention.quest import QuestPolicy
from jaxinfer.errors import ConfigError
from jaxinfer.models import MoEConfig
from jaxinfer.models.config import ModelConfig, RopeConfig
from jaxinfer.quant.form import quantization
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.demand import DemandModel
from jaxinfer.schedule.profile import A100, MAX, PRACTICAL, SUM, Joint, MachineProfile, measured

LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp_width=14336,
    context_length=8192,
    rope=RopeConfig(theta=500000.0, dim=128),
)
PEAK = Cost.paper(parameters=8.03e9, kv_width=1024, layers=32, flops=312e12, bandwidth=2039e9)


def test_densities_of_the_paper():
    """Its figure 6: 0.096 for 16 K output tokens; the constant 801 (p + d) / (d (p + d / 2)) of Llama-3-8B on an A100."""
    assert PEAK.density(16384, 0, 16384) == pytest.approx(0.0978, rel=0.01)
    assert PEAK.density(645, 600, 45) == pytest.approx(801 * 645 / (45 * 622.5), rel=0.005)
    assert PEAK.density(5, 5, 0) == np.inf


def test_a_models_own_shapes_agree_with_the_plain_formulae():
    """The embedding takes no operations, and the operations of the first token's attention are next to none."""
    cost = Cost.of(DemandModel(LLAMA_8B, "bfloat16"), MachineProfile(flops=312e12, bandwidth=2039e9))
    assert cost.key_seconds == pytest.approx(PEAK.key_seconds)
    assert cost.token_seconds == pytest.approx(
        PEAK.token_seconds * (8.03e9 - 128256 * 4096) / 8.03e9, rel=0.001
    )
    assert cost.step_seconds == pytest.approx(2 * 8.03e9 / 2039e9, rel=0.05)


def test_experts_quantization_and_streaming_change_what_they_should():
    experts = dataclasses.replace(
        LLAMA_8B, moe=MoEConfig(experts=8, experts_per_token=2, width=14336), moe_layers=()
    )
    dense, moe = (Cost.of(DemandModel(c, "bfloat16"), A100) for c in (LLAMA_8B, experts))
    assert 1.6 < moe.token_seconds / dense.token_seconds < 2  # two of eight experts
    assert 5 < moe.step_seconds / dense.step_seconds < 7  # all of eight
    packed = Cost.of(DemandModel(LLAMA_8B, "bfloat16", kv_dtype="int4"), A100)
    assert packed.key_seconds == pytest.approx((64 + 4) / 256 * dense.key_seconds)
    low = dataclasses.replace(LLAMA_8B, quantization=quantization("atom-w4a8", LLAMA_8B))
    assert 2.5 < dense.step_seconds / Cost.of(DemandModel(low, "bfloat16"), A100).step_seconds < 4
    away = Cost.of(DemandModel(experts, "bfloat16", expert_slots=64), A100)
    missing = 0.75 * 32 * 8 * 3 * 4096 * 14336 * 2
    assert away.step_seconds == pytest.approx(missing / A100.link)


def test_windows_and_quest_bound_what_a_long_answer_reads():
    every = dataclasses.replace(LLAMA_8B, windows=(0, 1024) * 16, moe_layers=())
    windowed, dense = (Cost.of(DemandModel(c, "bfloat16"), A100) for c in (every, LLAMA_8B))
    assert windowed.key_seconds == dense.key_seconds
    assert (windowed.read_limit, windowed.read_slope) == (pytest.approx(1024, abs=2), pytest.approx(0.5))
    quest = QuestPolicy(token_budget=1024, dense_layers=0)
    cost = Cost.of(DemandModel(LLAMA_8B, "bfloat16", quest=quest), A100)
    assert cost.read_slope == pytest.approx(1 / 16, rel=0.01)  # the bounds of each page
    assert cost.read_limit * 15 / 16 == pytest.approx(1024, rel=0.01)
    assert cost.memory(0, 8000) < 0.31 * dense.memory(0, 8000)
    assert (dense.read_limit, dense.read_slope) == (0, 1)


@given(st.integers(0, 40), st.integers(0, 60), st.integers(0, 50), st.sampled_from([0.0, 0.25, 1.0]))
def test_reads_with_a_token_budget(prompt, output, limit, slope):
    cost = Cost(token_seconds=1, key_seconds=1, read_limit=limit, read_slope=slope)
    fine = 64
    middle = (np.arange(output * fine) + 0.5) / fine
    seen = prompt + middle
    if limit:
        seen = np.minimum(seen, limit) + slope * np.maximum(seen - limit, 0)
    assert cost.reads(prompt, output) == pytest.approx(seen.sum() / fine, rel=0.01, abs=0.05)


def test_joint_times():
    assert (SUM(2.0, 3.0), MAX(2.0, 3.0), PRACTICAL(2.0, 3.0)) == (5, 3, pytest.approx(3.6))
    assert PRACTICAL(0.0, 0.0) == 0
    points = [(c, m, Joint(0.4, 0.2)(c, m)) for c in (1.0, 2.0, 5.0) for m in (0.5, 2.0, 7.0)]
    found = Joint.fit(points)
    assert (found.linear, found.square) == (pytest.approx(0.4), pytest.approx(0.2))
    assert Joint.fit([(1, 1, 5), (2, 1, 9)])(3.0, 2.0) == pytest.approx(5)


def test_a_profile_is_measured_once(tmp_path):
    first = measured(cache=tmp_path)
    assert first.flops > 1e9 and first.bandwidth > 1e8
    assert measured(cache=tmp_path) == first
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert measured(cache=tmp_path).flops > 1e9


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_machines_and_costs_are_refused(wrong):
    with pytest.raises(ConfigError, match="bandwidth"):
        MachineProfile(flops=1e12, bandwidth=wrong)
    with pytest.raises(ConfigError, match="key_seconds"):
        Cost(token_seconds=1.0, key_seconds=wrong)
    with pytest.raises(ConfigError):
        Cost.paper(
            parameters=1, kv_width=1, layers=1, flops=1, bandwidth=0.0 if np.isfinite(wrong) else wrong
        )
    with pytest.raises(ConfigError, match="between max and sum"):
        Joint(1.5)
    with pytest.raises(ConfigError, match="no measurements"):
        Joint.fit([])
