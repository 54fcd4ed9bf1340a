"""Every policy gives each request the answer that it has alone: pools that preempt, prompts that are others' beginnings, Quest,
packed keys, plans made anew and lengths that were lied about."""

import dataclasses

import numpy as np
import pytest
from helpers import answers, make_engine, request
from test_blend import overlapping, serve, workload  # noqa: F401 - a fixture for all

from jaxinfer.engine import engine as engine_module
from jaxinfer.schedule.profile import PRACTICAL, SUM, MachineProfile
from jaxinfer.schedule.workload import Sharing

TIGHT = ("cache.page_size=8", "cache.pages=31", "engine.max_tokens_per_step=16", "engine.chunk=16")
QUEST = (
    "sparsity.token_budget=32",
    "sparsity.dense_layers=1",
    "sparsity.reuse_steps=4",
    "sparsity.prompt_tail=8",
)
KINDS = {"dense": (), "quest on int4 keys": (*QUEST, "cache.dtype=int4")}


def batch(count, seed):
    """Prompts of shared beginnings, many of them whole prompts of others or beginnings of those; answers of 1 to 90 tokens."""
    draw = np.random.default_rng(seed)
    shared = [draw.integers(3, 97, size) for size in (8, 24, 40, 64)]
    out = []
    for index in range(count):
        own = draw.integers(3, 97, draw.choice((0, 1, 7, 8, 9, 16)))
        if index % 3 and out:
            other = out[draw.integers(len(out))].prompt_ids
            kept = other if index % 3 == 1 else other[: draw.integers(1, len(other) + 1)]
            prompt = np.concatenate([kept, own])[:140]
        else:
            prompt = np.concatenate([shared[draw.integers(4)], own])
        out.append(request(str(index), prompt, max_tokens=int(draw.choice((1, 2, 5, 13, 30, 90)))))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_policy_answers_as_each_request_alone(kind, monkeypatch):
    requests = batch(50, seed=3)
    engine = make_engine(overrides=(*TIGHT, *KINDS[kind]))
    alone = {}
    for each in requests:
        engine.forget_prefixes()
        alone |= tokens(answers(engine, [each]))
    for policy, joint in {"dfs": PRACTICAL, "blend": PRACTICAL, "blend apart": SUM}.items():
        profile = MachineProfile(flops=1e12, bandwidth=1e9, joint=joint)
        monkeypatch.setattr(engine_module, "measured", lambda dtype, profile=profile: profile)
        engine.forget_prefixes()
        assert tokens(serve(engine, requests, policy.split()[0])) == alone
    assert engine.metrics.preemptions > 10


def test_lies_about_lengths_change_no_answer():
    requests = batch(70, seed=4)
    engine = make_engine(overrides=TIGHT)
    true = tokens(answers(engine, requests))
    lies = np.where(np.arange(len(requests)) % 2, 1, 90)
    shape = dataclasses.replace(workload(requests), answer_limits=lies, answer_floors=lies)
    engine.forget_prefixes()
    plan = engine.blend(shape, Sharing.of(shape, 8))

    def hand_over():
        for index in plan.indices():
            plan.expects(requests[index].id, index)
            yield requests[index]

    assert tokens({out.request_id: out for out in engine.run(hand_over(), plan)}) == true


@pytest.mark.parametrize("joint", [PRACTICAL, SUM], ids=["blend", "apart"])
def test_answers_of_an_earlier_run_are_not_given_again_but_tell_lengths(joint, monkeypatch):
    profile = MachineProfile(flops=1e12, bandwidth=1e9, joint=joint)
    monkeypatch.setattr(engine_module, "measured", lambda dtype: profile)
    requests = [request(str(i), [3 + i % 90, 4, 5], max_tokens=1) for i in range(120)]
    known = np.where(np.arange(120) % 3, -1, 1)
    shape = dataclasses.replace(workload(requests), answer_limits=np.full(120, 80), answered=known)
    engine = make_engine(overrides=TIGHT)
    plan = engine.blend(shape, Sharing.of(shape, 8))
    if joint is PRACTICAL:
        assert plan.expected_tokens == 80 * (3 + 1)  # of those that are left, of one token each

    def hand_over():
        for index in plan.indices():
            plan.expects(requests[index].id, index)
            yield requests[index]

    served = [out.request_id for out in engine.run(hand_over(), plan)]
    assert sorted(served, key=int) == [str(i) for i in range(120) if i % 3]


def tokens(out):
    return {name: completion.token_ids for name, completion in out.items()}
