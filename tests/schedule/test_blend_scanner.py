"""What our scanner keeps count of while lengths are learned, against counting anew; and the pool's peak against waiting for it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.schedule.blend import BlendScanner
from jaxinfer.schedule.scanner import LEFT, RIGHT


def scanner_of(prompt, length, square, group, weight, shared=0, heavy=True):
    count = len(prompt)
    return BlendScanner(
        np.arange(count),
        np.full(count, 0.5 if heavy else 2.0),
        1.0,  # density of the batch
        np.asarray(prompt),
        np.asarray(prompt) // 2,  # the other half is shared
        shared,
        np.asarray(length, float),
        np.asarray(square, float),
        np.asarray(group),
        np.asarray(weight, float),
        1.0,
        1.0,
        0.0,
        10**6,
        100,
        64,
        8,
    )


requests = st.lists(
    st.tuples(st.integers(0, 50), st.integers(-1, 2), st.integers(1, 90)), min_size=1, max_size=20
)


@settings(max_examples=150, deadline=None)
@given(requests, st.data())
def test_what_is_left_is_what_counting_anew_gives_while_lengths_are_learned(rows, data):
    prompt, group, truth = (np.array(column) for column in zip(*rows))
    mean, square, weight = (
        np.array([10.0, 30.0, 2.0]),
        np.array([150.0, 1000.0, 8.0]),
        np.array([1.0, 4.0, 2.5]),
    )
    length = np.where(group < 0, truth, mean[group])
    squares = np.where(group < 0, truth**2, square[group])
    scanner = scanner_of(prompt, length, squares, group, weight, shared=40)
    order = data.draw(st.permutations(range(len(rows))))
    finished = order[: data.draw(st.integers(0, len(rows)))]
    for request in order:
        scanner.start(request, data.draw(st.sampled_from([LEFT, RIGHT])))
    for request in finished:
        scanner.finish(request, truth[request])

    def learned(request, of_truth, expected):
        mine = group[request]
        told = [of_truth(truth[other]) for other in finished if group[other] == mine]
        return (weight[mine] * expected[mine] + sum(told)) / (weight[mine] + len(told))

    tokens, reads = 40 + (prompt // 2).sum(), 0.0
    for request in range(len(rows)):
        answer, squared = truth[request], truth[request] ** 2
        if request not in finished and group[request] >= 0:
            answer, squared = learned(request, float, mean), learned(request, lambda n: n * n, square)
            assert scanner.expected(request) == pytest.approx(answer)
        tokens += answer
        reads += prompt[request] * answer + squared / 2
    assert scanner.left_tokens == pytest.approx(tokens)
    assert scanner.left_reads == pytest.approx(reads)
    assert scanner.running == len(rows) - len(finished)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=12)
)
def test_the_peak_is_the_most_that_is_held_at_any_step_to_come(rows):
    """Every answer ends when it is expected to; one that is late goes on for half as long as it has run."""
    prompt, length, age = (np.array(column) for column in zip(*rows))
    age[-1] = 0  # the one that is to start
    scanner = scanner_of(prompt, length, length**2, np.full(len(rows), -1), [])
    for request in np.argsort(-age, kind="stable"):
        if request != len(rows) - 1:
            scanner.clock = int(age.max() - age[request])
            scanner.start(request, RIGHT)
    scanner.clock = int(age.max())
    rest = np.maximum(length - age, age / 2)
    moments = np.concatenate([[0.0], rest])
    held = [(prompt + age + moment)[rest >= moment].sum() for moment in moments]
    assert scanner.peak(len(rows) - 1) == pytest.approx(max(held))


@pytest.mark.parametrize("begin", [0, 5])
def test_a_plan_made_anew_counts_what_runs_by_what_is_left_of_it(begin):
    before = scanner_of([10, 20, 30], [8, 8, 8], [64, 64, 64], [-1, -1, -1], [])
    before.clock = begin
    before.start(0, RIGHT)
    before.clock = begin + 3
    after = scanner_of([10, 20, 30], [8, 8, 8], [64, 64, 64], [-1, -1, -1], [])
    plain = after.left_tokens, after.left_reads
    after.go_on(before, np.array([0]))
    assert after.left_tokens == plain[0] + 5
    assert after.left_reads == plain[1] + (10 + 3) * 5 + 5 * 5 / 2
    after.finish(0, 8)
    assert after.heavies == 0 and after.running == 0
