"""Slot counts and hit rates against the paper's, and what the placements promise."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig, MoEConfig, RopeConfig
from jaxinfer.offload.budget import expert_slots, moe_layers, paper_slots, shared_bytes
from jaxinfer.offload.placement import PLACEMENTS, by_layer, by_popularity, hit_rate, read_popularity
from jaxinfer.offload.residents import Residents
from pallas_kernels.packed_experts import Record

MIB = 2**20
PUBLISHED = ("model", "mixtral_8x7b_original")
MIXTRAL = ModelConfig(
    family="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp_width=14336,
    context_length=32768,
    rope=RopeConfig(theta=1e6, dim=128),
    moe=MoEConfig(experts=8, experts_per_token=2, width=14336),
)


@pytest.mark.parametrize("mib, slots", [(24_576, 56), (49_140, 125)])
def test_the_papers_rule_gives_the_papers_counts(mib, slots):
    assert paper_slots(MIXTRAL, mib * MIB) == slots


def test_shapes_of_mixtral():
    assert Record(4096, 14336, "bfloat16").nbytes == 336 * MIB
    assert shared_bytes(MIXTRAL, "bfloat16") == 2 * (46_702_792_704 - 256 * 3 * 4096 * 14336)
    assert moe_layers(MIXTRAL) == 32
    assert Record(4096, 14336, "bfloat16").nbytes / Record(4096, 14336, "int4").nbytes > 3.7


def test_slots_are_whole_experts_and_no_more_than_there_are():
    one = Record(4096, 14336, "int8").nbytes
    assert [expert_slots(MIXTRAL, one, n) for n in (-1, one - 1, one, 3 * one - 1, 10**13)] == [
        0, 0, 1, 2, 256,
    ]  # fmt: skip


def test_hit_rates_on_the_published_counts(shared_data):
    counts = read_popularity(shared_data("traces/mixtral_expert_popularity.json"), 32, 8, within=PUBLISHED)
    for slots, best, worst in ((56, 0.266, 0.171), (125, 0.552, 0.425)):
        assert hit_rate(counts, by_popularity(counts, slots)) == pytest.approx(best, abs=0.005)
        assert hit_rate(counts, by_popularity(-counts, slots)) == pytest.approx(worst, abs=0.005)
        rng = np.random.default_rng(0)
        random = [hit_rate(counts, by_popularity(rng.random((32, 8)), slots)) for _ in range(200)]
        assert np.mean(random) == pytest.approx(slots / 256, abs=0.005)


counts_of_layers = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.integers(0, 50)
)


@given(counts_of_layers, st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_every_placement_uses_the_slots(counts, slots):
    for name, place in PLACEMENTS.items():
        resident = place(counts, slots)
        assert resident.shape == counts.shape
        full = min(slots, counts.size)
        if name == "whole_layers":
            full = min(full // counts.shape[1], counts.shape[0]) * counts.shape[1]
        assert resident.sum() == full
    chosen, others = counts[by_popularity(counts, slots)], counts[~by_popularity(counts, slots)]
    assert not (chosen.size and others.size) or chosen.min() >= others.max()
    per_layer = by_layer(counts, slots).sum(axis=1)
    assert per_layer.max() - per_layer.min() <= 1


@pytest.mark.parametrize(
    "content, wrong",
    [
        ("not json", "cannot be read"),
        ('{"model": 1}', "has no"),
        ('{"counts": [[1, 2], [3, 4]]}', r"shape \[2, 2\]"),
        ('{"counts": [[1, 2, 3], [4, -1, 6]]}', "at least 0"),
        ('{"counts": [[1, 2, 3], [4, "x", 6]]}', "at least 0"),
    ],
)
def test_popularity_files_that_cannot_be_used(tmp_path, content, wrong):
    path = tmp_path / "popularity.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=wrong):
        read_popularity(path, 2, 3)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_popularity(tmp_path / "none.json", 2, 3)


def test_every_text_weighs_the_same(tmp_path):
    path = tmp_path / "popularity.json"
    path.write_text(json.dumps({"a": {"counts": [[1, 2]]}, "b": {"c": {"counts": [[3, 4]], "tokens": 7}}}))
    assert read_popularity(path, 1, 2) == pytest.approx(np.array([[1 / 3 + 3 / 7, 2 / 3 + 4 / 7]]) / 2)
    assert read_popularity(path, 1, 2, within=("b",)) == pytest.approx(np.array([[3 / 7, 4 / 7]]))
    with pytest.raises(ConfigError, match="cannot be read: KeyError"):
        read_popularity(path, 1, 2, within=("c",))


@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_residents_follow_the_workload(seed, slots, landing):
    rng = np.random.default_rng(seed)
    residents = Residents(by_popularity(rng.random((3, 6)), slots), landing)
    hot = [int(rng.integers(6)) for _ in range(3)]
    for _ in range(200):
        for layer in range(3):
            tokens = np.zeros(6, int)
            tokens[hot[layer]] = 1
            residents.visit(layer, tokens)
            there = residents.slot_of[layer, hot[layer]] >= 0
            victim = residents.victim(layer, hot[layer])
            if victim is not None and not residents.stays(layer, hot[layer]):
                if not there:
                    residents.bring(layer, hot[layer])
                residents.keep(layer, hot[layer], victim)
            guest = int(rng.integers(6))  # and the link brings what it thinks that the next layer will want
            following = (layer + 1) % 3
            if residents.slot_of[following, guest] < 0:
                assert residents.bring(following, guest) == residents.slot_of[following, guest]
            residents.check_integrity()
    assert sum(residents.stays(layer, hot[layer]) for layer in range(3)) == min(slots, 3)
    assert residents.count == slots + landing
    first = residents.begin()
    residents.check_integrity()
    assert len(first) == slots and all(residents.stays(*place) for place in first)
