"""Whoever computes the experts, the answers are those of the model that is wholly on the device."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.errors import ENGINE_FAILURE
from jaxinfer.offload import policy
from jaxinfer.offload.host_experts import LayerExperts
from jaxinfer.offload.timeline import Split

from .engines import EXPERT, LAYERS, MOE, answers, ids, requests, split, whole

ALL = len(LAYERS) * MOE.moe.experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def wanted():
    return ids(answers(whole(), requests(12)))


def any_split(load, costs):
    """Everything that is missing goes anywhere."""
    missing = [int(expert) for expert in load.missing]
    ANY.shuffle(missing)
    cut = int(ANY.integers(len(missing) + 1))
    return Split(tuple(missing[:cut]), tuple(missing[cut:]))


ANY = np.random.default_rng(0)


@pytest.fixture
def random_policy(monkeypatch):
    monkeypatch.setattr("jaxinfer.offload.offload.POLICIES", {"balanced": any_split})


@pytest.mark.parametrize("name", policy.POLICIES)
def test_every_policy_gives_the_same_answers(folder, wanted, name):
    engine = split(folder, 5, f"offload.policy={name}", "offload.adaptive=false")
    assert engine.memory.expert_slots == 5
    assert ids(answers(engine, requests(12))) == wanted
    traffic = engine.offload.metrics()
    assert traffic["expert_visits"] > traffic["expert_hits"] >= 0
    assert name != "stream" or traffic["expert_on_host"] == 0
    assert name != "host" or traffic["expert_streamed"] == 0
    assert traffic["expert_collected"] == 0  # the host works on the device's cores here
    assert traffic["expert_streamed_bytes"] == EXPERT * traffic["expert_streamed"]


@pytest.mark.parametrize("slots, landing", [(1, 1), (8, 2), (ALL - 1, 5)])
def test_any_split_gives_the_same_answers(folder, wanted, random_policy, slots, landing):
    engine = split(folder, slots, f"offload.landing_slots={landing}")
    assert ids(answers(engine, requests(12))) == wanted
    assert engine.metrics.cached_tokens > 0
    assert engine.metrics.prefill_tokens > 0 and engine.metrics.steps > 12


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="dense"),
        pytest.param(
            ("sparsity.token_budget=64", "cache.dtype=int4"), id="quest-int4", marks=pytest.mark.slow
        ),
    ],
)
def test_beams_choose_the_same(folder, random_policy, overrides):
    asked = requests(6, tokens=6)
    for index in (0, 1, 4):
        sampling = replace(asked[index].sampling, beam_width=3, n=3)
        asked[index] = replace(asked[index], sampling=sampling)
    wanted = answers(whole(*overrides), asked)
    engine = split(folder, 5, *overrides)
    got = answers(engine, asked)
    assert [each.choices for each in got] == [each.choices for each in wanted]
    assert [len(each.choices) for each in got] == [3, 3, 1, 1, 3, 1] and engine.metrics.copied_pages > 0
    assert engine.offload.metrics()["expert_on_host"] > 0


def test_a_device_that_holds_all(folder, wanted):
    engine = split(folder, ALL)
    assert ids(answers(engine, requests(12))) == wanted
    traffic = engine.offload.metrics()
    assert traffic["expert_hits"] == traffic["expert_visits"] and traffic["expert_streamed"] == 0


def test_asking_twice_and_fetching_ahead_give_the_same_answers(folder, wanted):
    """As where the host is another machine's worth of cores: the link has time, and the device need not wait."""
    engine = split(folder, 6, "offload.landing_slots=3")
    host = replace(engine.offload.costs.host, flat=1.0)
    costs = replace(engine.offload.costs, host=host, link=1.1, ask=0.0)
    engine.offload._exchange._costs = costs
    assert ids(answers(engine, requests(12))) == wanted
    traffic = engine.offload.metrics()
    assert traffic["expert_collected"] > 0
    assert traffic["expert_ahead"] > traffic["expert_ahead_used"] > 0


@pytest.mark.parametrize(
    "count", [1, 5, 64, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 64) if n != 5)]
)
def test_batches_of_any_size(folder, random_policy, count):
    overrides = ("engine.max_seqs=64", "cache.pages=600")
    asked = requests(count, tokens=5, seed=count)
    wanted = ids(answers(whole(*overrides), asked))
    assert ids(answers(split(folder, 6, *overrides), asked)) == wanted


def test_preempted_sequences_and_single_steps(folder, random_policy):
    overrides = ("cache.pages=16", "engine.decode_steps=1", "engine.chunk=7")
    asked = requests(6, tokens=30, longest=8)
    engine = split(folder, 6, *overrides)
    assert ids(answers(engine, asked)) == ids(answers(whole(), asked))
    assert engine.metrics.preemptions > 0


@pytest.mark.slow
def test_unrolled_layers(folder, wanted, random_policy):
    from jaxinfer.engine.engine import Engine
    from jaxinfer.models import unstack
    from jaxinfer.models.decoder import without_experts

    from .engines import model, store

    made = split(folder, 6)
    engine = Engine(MOE, unstack(without_experts(model()), MOE), made.settings, experts=store(folder))
    assert ids(answers(engine, requests(12))) == wanted


def test_with_quest(folder, random_policy):
    quest = ("sparsity.token_budget=64", "sparsity.dense_layers=1")
    asked = requests(6, tokens=20, longest=180)
    wanted = ids(answers(whole(*quest), asked))
    assert ids(answers(split(folder, 6, *quest), asked)) == wanted
    assert wanted != ids(answers(whole(), asked))


@pytest.mark.parametrize("format", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_rounded_experts_are_the_same_wherever_they_are(folder, random_policy, wanted, format):
    on_device = ids(answers(split(folder, ALL, format=format), requests(12)))
    assert ids(answers(split(folder, 6, format=format), requests(12))) == on_device
    assert format == "int8" or on_device != wanted


@pytest.mark.parametrize("ask", [np.inf, 0.0])
def test_a_failure_names_the_layer_and_the_engine_goes_on(folder, wanted, monkeypatch, ask):
    engine = split(folder, 1, "offload.policy=host", "offload.adaptive=false")
    engine.offload._exchange._costs = replace(engine.offload.costs, ask=ask)
    right, calls = LayerExperts.compute, []

    def wrong(*args):
        calls.append(args)
        if len(calls) in (20, 21):
            raise OSError("the disk is gone")
        return right(*args)

    monkeypatch.setattr(LayerExperts, "compute", wrong)
    out = answers(engine, requests(12))
    failed = [completion for completion in out if completion.error is not None]
    assert 0 < len(failed) <= 8
    for completion in failed:
        assert completion.error.code == ENGINE_FAILURE
        assert (
            "layer " in completion.error.message and "OSError: the disk is gone" in completion.error.message
        )
    right_ones = [(index, c) for index, c in enumerate(out) if c.error is None]
    assert all(tuple(completion.token_ids) == wanted[index] for index, completion in right_ones)
    assert ids(answers(engine, requests(12))) == wanted
