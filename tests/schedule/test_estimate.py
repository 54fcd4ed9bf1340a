"""What is left of a batch."""

import numpy as np
import pytest

from jaxinfer.schedule.estimate import Estimate
from jaxinfer.schedule.workload import Sharing, Workload


def estimate(prompts, limits, shared=0):
    starts = np.concatenate([[0], np.cumsum(prompts)]).astype(np.int64)
    workload = Workload(
        tokens=np.zeros(starts[-1], np.int32), starts=starts, answer_limits=np.asarray(limits, np.int64)
    )
    return Estimate(
        workload, Sharing(rank=np.arange(len(limits)), common=np.zeros(len(limits)), shared_tokens=shared)
    )


def test_before_any_answer_half_of_the_limits_are_expected():
    assert estimate([100, 50], [20, 60], shared=30).tokens == 120 + 40


def test_it_learns_what_share_of_their_limits_answers_use():
    plan = estimate([100] * 1000, [50] * 1000)
    for _ in range(900):
        plan.finish(50, 5)
    assert plan.tokens == pytest.approx(100_000 + 5 * 1000, rel=0.01)
    assert plan.share(plan.tokens / 4) == 0.25
    assert plan.seconds_left(plan.tokens / 4, 30) == pytest.approx(90)


def test_answers_of_an_earlier_run_teach_and_are_no_work():
    starts = np.array([0, 100, 200, 300, 400])
    workload = Workload(
        tokens=np.zeros(400, np.int32),
        starts=starts,
        answer_limits=np.array([50, 1000, 50, 1000]),
        answered=np.array([-1, 100, -1, 100]),
    )
    plan = Estimate(workload, Sharing(rank=np.arange(4), common=np.zeros(4), shared_tokens=80))
    assert plan.rows == 2
    learned = (200 + 0.5 * 8 * 50) / (2000 + 8 * 50)  # beside the guess, which counts as eight answers
    assert plan.answer_share == pytest.approx(learned)
    assert plan.tokens == pytest.approx(200 * 0.8 + learned * 100)


def test_edges():
    empty = estimate([], [])
    assert empty.tokens == 0 and empty.share(0) == 1 and empty.seconds_left(0, 5) is None
    refused = estimate([0, 0], [0, 0])
    assert refused.tokens == 0 and refused.share(0) == 1
    plan = estimate([10], [10])
    assert plan.share(1000) == 1 and plan.seconds_left(1000, 1) == 0
