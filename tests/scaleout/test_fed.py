"""An engine that is fed bit by bit by the plan of a whole batch: the answers of any other order, whatever is expected of them."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from helpers import answers, make_engine, request

from jaxinfer.scaleout.fed import fed
from jaxinfer.scaleout.fleet_plan import FleetPlan, ahead
from jaxinfer.scaleout.inbox import Inbox, Sent
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.profile import PRACTICAL, SUM
from jaxinfer.schedule.scanner import LEFT, RIGHT
from jaxinfer.schedule.tree import RequestTree
from jaxinfer.schedule.workload import Sharing, Workload

SMALL = ("cache.page_size=8", "cache.pages=40")


def cost(joint=PRACTICAL):
    return Cost(token_seconds=2.0, key_seconds=0.02, step_seconds=8.0, joint=joint)


def planned(requests, limits=None, joint=PRACTICAL):
    prompts = [each.prompt_ids for each in requests]
    told = [each.sampling.max_tokens * each.sampling.n for each in requests] if limits is None else limits
    workload = Workload(
        tokens=np.concatenate(prompts).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum([len(prompt) for prompt in prompts])]),
        answer_limits=np.asarray(told, np.int64),
    )
    sharing = Sharing.of(workload, 8)
    return FleetPlan(workload, RequestTree.shared(workload, sharing, 8), sharing, cost(joint), 1, 4)


def serve(engine, requests, plan, joint=PRACTICAL):
    """One worker's part of a fleet, without the processes."""
    inbox, numbers, out = Inbox(), {each.id: i for i, each in enumerate(requests)}, {}

    def feed():
        sides = plan.dispatcher.sides
        waiting = inbox.waiting()[:sides]
        room = [most - here for most, here in zip(ahead(engine.settings.engine.max_seqs), waiting)]
        sent = [
            plan.fetch(iter([requests[index]]), index)
            for rows in plan.dispatcher.take(0, room, waiting, idle=not inbox.waiting())
            for index in rows.tolist()
        ]
        inbox.put(sent, plan.coming(0))
        if not plan.dispatcher.left:
            inbox.close()

    feed()
    source, admission = fed(inbox, engine, cost(joint))
    for completion in engine.run(source, admission):
        assert completion.request_id not in out
        out[completion.request_id] = completion
        plan.learn(numbers[completion.request_id], completion.usage.completion_tokens)
        feed()
    engine.check_integrity()
    assert not engine.planner.running and not len(admission)
    return out, admission


def mixed(count):
    """Short answers behind three shared prefixes, and long answers of their own."""
    draw = np.random.default_rng(0)
    shared = [draw.integers(3, 97, 48) for _ in range(3)]
    out = []
    for index in range(count):
        if index % 3:
            prompt = np.concatenate([shared[draw.integers(3)], draw.integers(3, 97, draw.integers(2, 10))])
            out.append(request(str(index), prompt, max_tokens=int(draw.integers(1, 5))))
        else:
            out.append(request(str(index), draw.integers(3, 97, 5), max_tokens=int(draw.integers(30, 100))))
    return out


@pytest.mark.parametrize("joint", [PRACTICAL, SUM], ids=["overlaps", "apart"])
def test_greedy_answers_are_the_same(joint):
    requests = mixed(24)
    engine, plan = make_engine(overrides=SMALL), planned(requests, joint=joint)
    assert plan.dispatcher.sides == (2 if joint is PRACTICAL else 1)
    expected = answers(make_engine(overrides=SMALL), requests)
    out, _ = serve(engine, requests, plan, joint)
    assert {name: each.token_ids for name, each in out.items()} == {
        name: each.token_ids for name, each in expected.items()
    }


@pytest.mark.parametrize(("truth", "told"), [(1, 60), (60, 1)], ids=["all short", "all long"])
def test_every_request_finishes_whatever_is_expected_of_it(truth, told):
    draw = np.random.default_rng(2)
    requests = [request(str(i), draw.integers(3, 97, 1 + i % 40), max_tokens=truth) for i in range(40)]
    engine = make_engine(overrides=("cache.page_size=8", "cache.pages=26"))
    plan = planned(requests, limits=[told + i % 2 for i in range(40)])
    out, admission = serve(engine, requests, plan)
    assert len(out) == 40 and all(len(each.token_ids) == truth for each in out.values())
    scanner = admission._scanner
    assert scanner.running == scanner.heavies == 0 and scanner.light_held == pytest.approx(0)
    np.testing.assert_allclose(scanner.waiting, 0, atol=1e-6)
    assert len(set(admission._places)) == len(admission._places) == len(scanner.prompt)


def test_several_choices_and_requests_that_are_refused_leave_their_places():
    requests = [
        request(str(i), [5, 6, 7, i + 3], max_tokens=3, n=1 + i % 3, temperature=1.0) for i in range(90)
    ]
    for i in range(0, 90, 4):
        requests[i] = request(str(i), [5] * 250, max_tokens=100)  # longer than the pool
    engine = make_engine(overrides=SMALL)
    out, admission = serve(engine, requests, planned(requests))
    assert [out[each.id].error is None for each in requests] == [i % 4 > 0 for i in range(90)]
    assert all(len(out[str(i)].choices) == 1 + i % 3 for i in range(90) if i % 4)
    assert len(set(admission._places)) == len(admission._scanner.prompt)


def test_expectations_follow_the_answers_that_are_known():
    requests = [request(str(i), [3 + i % 90, 4, 5], max_tokens=1) for i in range(60)]
    plan = planned(requests, limits=[200] * 60)
    before = plan.coming(0)
    first = plan.fetch(iter(requests), 0).length
    for index in range(40):
        plan.learn(index, 2)
    after, later = plan.coming(0), plan.fetch(iter(requests[1:]), 1).length
    assert later < 0.3 * first and after[:, 2].sum() < 0.3 * before[:, 2].sum()
    assert after[:, 0].sum() - after[:, 1].sum() == pytest.approx(before[:, 0].sum() - before[:, 1].sum())


def test_an_inbox_gives_of_the_side_that_is_asked_for():
    inbox = Inbox()
    inbox.put([Sent(request(str(i), [3]), side) for i, side in enumerate([LEFT, RIGHT, RIGHT])])
    assert inbox.waiting() == (1, 2) and inbox.ready(sides=[LEFT])
    assert inbox.take([LEFT]).request.id == "0"
    assert not inbox.ready(sides=[LEFT]) and inbox.ready()
    assert [each.id for each in (next(inbox), next(inbox))] == ["1", "2"]
    inbox.close()
    assert inbox.take([LEFT]) is None and list(inbox) == []
    inbox.put([Sent(request("3", [3]), RIGHT)])
    assert inbox.take([LEFT]).request.id == "3"
