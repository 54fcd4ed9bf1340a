"""The schedule policies in the engine: the same answers, every request finished, prefixes kept."""

import dataclasses

import numpy as np
import pytest
from helpers import LLAMA, answers, greedy, make_engine, request

from jaxinfer.engine import engine as engine_module
from jaxinfer.engine.apart import Apart
from jaxinfer.schedule.profile import PRACTICAL, SUM, MachineProfile
from jaxinfer.schedule.tree import RequestTree
from jaxinfer.schedule.workload import POLICIES, Sharing, Workload


@pytest.fixture(autouse=True)
def overlapping(monkeypatch):
    """A machine on which blending pays, whatever this one is."""
    profile = MachineProfile(flops=1e12, bandwidth=1e9, joint=PRACTICAL)
    monkeypatch.setattr(engine_module, "measured", lambda dtype: profile)


SMALL = ("cache.page_size=8", "cache.pages=64")


def mixed(count, seed=0):
    """Short answers behind three shared prefixes, and long answers of their own."""
    draw = np.random.default_rng(seed)
    shared = [draw.integers(3, 97, 48) for _ in range(3)]
    out = []
    for index in range(count):
        if index % 3:
            prompt = np.concatenate([shared[draw.integers(3)], draw.integers(3, 97, draw.integers(2, 10))])
            out.append(request(str(index), prompt, max_tokens=int(draw.integers(1, 5))))
        else:
            out.append(request(str(index), draw.integers(3, 97, 5), max_tokens=int(draw.integers(30, 100))))
    return out


def workload(requests, floors=None):
    prompts = [request.prompt_ids for request in requests]
    return Workload(
        tokens=np.concatenate([*prompts, np.zeros(0, np.int32)]).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum([len(p) for p in prompts])]).astype(np.int64),
        answer_limits=np.array([r.sampling.max_tokens * r.sampling.sequences for r in requests], np.int64),
        answer_floors=floors,
    )


def serve(engine, requests, policy, floors=None):
    shape = workload(requests, floors)
    sharing = Sharing.of(shape, engine.settings.cache.page_size)
    if policy != "blend":
        return answers(engine, [requests[i] for i in POLICIES[policy](sharing)])
    plan = engine.blend(shape, sharing)

    def hand_over():
        for index in plan.indices():
            plan.expects(requests[index].id, index)
            yield requests[index]

    out = {completion.request_id: completion for completion in engine.run(hand_over(), plan)}
    engine.check_integrity()
    assert not engine.planner.running and not len(plan)
    return out


@pytest.mark.parametrize("policy", ["fcfs", "random", "longest-prefix", "dfs", "blend"])
def test_greedy_answers_are_the_same_under_every_policy(policy):
    requests = mixed(24)
    engine = make_engine(overrides=(*SMALL, f"schedule.policy={policy}"))
    out = serve(engine, requests, policy)
    assert len(out) == len(requests)
    for each in requests:
        assert list(out[each.id].token_ids) == greedy(LLAMA, each.prompt_ids, each.sampling.max_tokens)


def test_blending_finds_as_many_prefixes_as_depth_first_order():
    requests, cached = mixed(150, seed=1), {}
    for policy in ("fcfs", "dfs", "blend"):
        engine = make_engine(overrides=SMALL)
        serve(engine, requests, policy)
        cached[policy] = engine.metrics.cached_tokens
    assert cached["blend"] >= 0.97 * cached["dfs"]


@pytest.mark.parametrize("truth", [1, 60], ids=["all short", "all long"])
@pytest.mark.parametrize("told", ["nothing", "all", "a lie"])
def test_every_request_finishes_whatever_is_expected_of_it(truth, told):
    draw = np.random.default_rng(2)
    requests = [request(str(i), draw.integers(3, 97, 1 + i % 40), max_tokens=truth) for i in range(40)]
    engine = make_engine(overrides=("cache.page_size=8", "cache.pages=26"))
    floors = {"all": np.full(40, truth)}.get(told)
    if told == "a lie":
        lied = [
            dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_tokens=61 - truth))
            for r in requests
        ]
        shape = dataclasses.replace(workload(lied), answer_floors=workload(lied).answer_limits)
        plan = engine.blend(shape, Sharing.of(shape, 8))

        def hand_over():
            for index in plan.indices():
                plan.expects(requests[index].id, index)
                yield requests[index]

        out = list(engine.run(hand_over(), plan))
        engine.check_integrity()
    else:
        out = serve(engine, requests, "blend", floors).values()
    assert len(out) == 40 and all(len(each.token_ids) == truth for each in out)


def test_several_choices_of_a_request_count_once():
    requests = [
        request(str(i), [5, 6, 7, i + 3], max_tokens=3, n=1 + i % 3, temperature=1.0) for i in range(20)
    ]
    engine = make_engine(overrides=SMALL)
    out = serve(engine, requests, "blend")
    assert all(len(out[each.id].choices) == each.sampling.n for each in requests)


def test_beam_searches_are_planned_as_the_work_of_all_their_beams():
    requests = [
        request(
            str(i), [5, 6, 7, i + 3], max_tokens=3 + i % 9, **({"beam_width": 4, "n": 2} if i % 3 else {})
        )
        for i in range(20)
    ]
    assert workload(requests).answer_limits[:2].tolist() == [3, 4 * 4]
    engine = make_engine(overrides=SMALL)
    out = serve(engine, requests, "blend")
    alone = answers(engine, requests)
    assert all(out[each.id].choices == alone[each.id].choices for each in requests)


def test_the_plan_is_made_anew_when_lengths_are_known():
    """Answers end at once although their limits are long: the plan learns it while it runs."""
    requests = [request(str(i), [3 + i % 90, 4, 5], max_tokens=1) for i in range(300)]
    engine = make_engine(overrides=SMALL)
    shape = dataclasses.replace(workload(requests), answer_limits=np.full(300, 80))
    plan = engine.blend(shape, Sharing.of(shape, 8))
    before = plan.expected_tokens

    def hand_over():
        for index in plan.indices():
            plan.expects(requests[index].id, index)
            yield requests[index]

    assert len(list(engine.run(hand_over(), plan))) == 300
    assert before > 300 * 30 and plan.expected_tokens < 300


@pytest.mark.parametrize("count", [0, 1])
def test_hardly_any_request(count):
    assert len(serve(make_engine(overrides=SMALL), mixed(count), "blend")) == count


def test_a_request_that_can_never_be_served_is_an_error_beside_the_others():
    requests = [*mixed(5), request("big", np.full(250, 7), max_tokens=200)]
    out = serve(make_engine(overrides=SMALL), requests, "blend")
    assert out["big"].error is not None and sum(each.error is None for each in out.values()) == 5


def test_what_was_preempted_goes_first():
    requests = mixed(30, seed=4)
    engine = make_engine(overrides=("cache.page_size=8", "cache.pages=20"))
    requests = [r for r in requests if len(r.prompt_ids) + r.sampling.max_tokens < 100]
    out = serve(engine, requests, "blend")
    assert len(out) == len(requests) and all(each.error is None for each in out.values())


def test_the_tree_of_the_engine_is_the_tree_of_the_plan():
    requests = mixed(60)
    engine = make_engine(overrides=("cache.page_size=8", "cache.pages=2000", "engine.max_seqs=1"))
    serve(engine, requests, "dfs")
    shared = RequestTree.of(workload(requests), 8).shared_tokens
    assert engine.metrics.cached_tokens == shared


def test_where_nothing_overlaps_each_kind_of_work_comes_by_itself_in_depth_first_order(monkeypatch):
    profile = MachineProfile(flops=1e12, bandwidth=1e9, joint=SUM)
    monkeypatch.setattr(engine_module, "measured", lambda dtype: profile)
    requests = mixed(60, seed=6)
    engine = make_engine(overrides=SMALL)
    shape = workload(requests, np.array([r.sampling.max_tokens for r in requests]))
    sharing = Sharing.of(shape, 8)
    plan = engine.blend(shape, sharing)
    assert isinstance(plan, Apart)
    order, rank = list(plan.indices()), sharing.rank
    longest = sorted(
        range(0, 60, 3), key=lambda i: -requests[i].sampling.max_tokens
    )  # of those that share nothing
    first = next(place for place in range(60, 0, -1) if order[place - 1] not in longest)
    early, late = order[:first], order[first:]
    assert len(late) >= 10 and set(late) == set(longest[: len(late)])
    for part in (early, late):
        assert [rank[i] for i in part] == sorted(rank[i] for i in part)
    out = serve(engine, requests, "blend")
    for each in requests[::7]:
        assert list(out[each.id].token_ids) == greedy(LLAMA, each.prompt_ids, each.sampling.max_tokens)


def test_a_plan_made_anew_hands_every_request_over_once_and_keeps_what_has_started():
    """A sample runs first, lengths are learned, what waits is planned again; places in the queues change, none is lost."""
    draw = np.random.default_rng(7)
    requests = [
        request(
            str(i), [*draw.integers(3, 97, 4), i % 90 + 3], max_tokens=int(draw.integers(1, 4)), n=1 + i % 2
        )
        for i in range(1200)
    ]
    engine = make_engine(overrides=SMALL)
    shape = dataclasses.replace(workload(requests), answer_limits=np.full(1200, 100))
    plan = engine.blend(shape, Sharing.of(shape, 8))
    handed = []

    def hand_over():
        for index in plan.indices():
            handed.append(index)
            plan.expects(requests[index].id, index)
            yield requests[index]

    answered, scanners = [], set()
    for out in engine.run(hand_over(), plan):
        answered.append(out.request_id)
        scanners.add(id(plan._scanner))
    assert sorted(handed) == list(range(1200)) and len(scanners) > 2
    assert sorted(answered, key=int) == [str(i) for i in range(1200)]


def test_preempted_requests_go_before_all_that_wait_in_the_order_of_their_start():
    requests = mixed(30, seed=4)
    engine = make_engine(overrides=("cache.page_size=8", "cache.pages=40"))
    shape = workload(requests)
    plan = engine.blend(shape, Sharing.of(shape, 8))
    source = plan.indices()
    for index in source:
        plan.expects(requests[index].id, index)
        engine.add(requests[index])
        if len(engine.planner.waiting) == 30:
            break
    engine.planner.waiting, fifo = plan, engine.planner.waiting
    for sequence in fifo:
        plan.add(sequence)
    for _ in range(6):
        engine.step()
    running = list(engine.planner.running)
    assert len(running) > 2
    for victim in (running[-1], running[-2]):
        engine.planner._preempt(victim)
    waiting = list(plan)
    assert waiting[:2] == [running[-2], running[-1]]
    engine._start_over()  # such as after the device ran out of memory
    assert list(plan)[: len(running)] == running
    finished = set()
    while engine.busy:
        engine.step()
        while engine._finished:
            finished.add(engine._finished.popleft().request_id)
    assert finished == {each.id for each in requests}
