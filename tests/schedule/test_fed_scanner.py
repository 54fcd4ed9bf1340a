"""A worker's scanner: what it counts as left is what counting anew gives, and steps follow from it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.schedule.fed import FedScanner
from jaxinfer.schedule.scanner import LEFT, RIGHT

PLACES = 6
FREE = 5


def scanner_of(capacity=1000, slots=4, max_tokens=64, quantum=1):
    return FedScanner(PLACES, 2.0, 2.0 * FREE, capacity, slots, max_tokens, quantum)


def work(prompt, alone, length, age=0):
    rest = max(length - age, 0)
    tokens = alone * (age == 0) + rest
    return np.array([tokens, rest, (prompt + age) * rest + rest * rest / 2])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_left_is_what_counting_anew_gives(data):
    scanner, waiting, running = scanner_of(), {}, {}
    coming = np.array(
        data.draw(st.lists(st.lists(st.integers(0, 99), min_size=3, max_size=3), min_size=2, max_size=2))
    )
    scanner.outlook(coming.astype(float))
    for _ in range(30):
        free = [place for place in range(PLACES) if place not in waiting and place not in running]
        kinds = (
            ["step"]
            + ["arrive"] * bool(free)
            + ["start"] * bool(waiting)
            + ["finish", "preempt"] * bool(running)
        )
        kind = data.draw(st.sampled_from(kinds))
        if kind == "arrive":
            side, prompt, length = data.draw(
                st.tuples(st.sampled_from([LEFT, RIGHT]), st.integers(1, 50), st.integers(1, 50))
            )
            waiting[free[0]] = side, prompt, prompt // 2, length
            scanner.arrive(free[0], *waiting[free[0]])
        elif kind == "start":
            place = data.draw(st.sampled_from(sorted(waiting)))
            running[place] = (*waiting.pop(place), scanner.clock)
            scanner.start(place, running[place][0])
        elif kind in ("finish", "preempt"):
            place = data.draw(st.sampled_from(sorted(running)))
            *request, _ = running.pop(place)
            if kind == "preempt":
                waiting[place] = tuple(request)
                scanner.preempt(place)
            else:
                scanner.finish(place, 7)
        else:
            scanner.step(3, 9)
        expected = coming.astype(float)
        for side, *request in waiting.values():
            expected[side] += work(*request)
        for side, prompt, alone, length, since in running.values():
            if side == LEFT:
                expected[LEFT, 0] += (alone + length) / 2  # half done, and it reads next to nothing
            else:
                rest = work(prompt, 0, length, scanner.clock - since)
                expected[RIGHT] += rest
        np.testing.assert_allclose(scanner.remaining(), expected, atol=1e-6)
        assert scanner.running == len(running)


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [(0, FREE), (40, 10), (100, 25), (1000, 64)],
)
def test_a_step_computes_as_much_as_keeps_the_balance_of_all_that_is_left(keys, tokens):
    scanner = scanner_of()
    scanner.arrive(0, RIGHT, 10, 10, 100.0)
    scanner.start(0, RIGHT)
    own = work(10, 0, 100)
    scanner.outlook(np.array([[10_000.0 - own[0], 10.0, 5_000.0], [0.0, 0.0, 35_000.0 - own[2]]]))
    assert scanner.balance == pytest.approx(1 / 4)
    assert (
        scanner.prefill(3, keys) + 3 == tokens
    )  # at least what the weights' reading leaves free, at most a step


def test_memory_heavy_ones_leave_the_others_their_share_until_none_of_these_is_left():
    scanner = scanner_of(capacity=300)
    for place in range(3):
        scanner.arrive(place, RIGHT, 10, 10, 90.0)
    rest = np.array([0.0, 1.0, 9e9])
    scanner.outlook(np.array([rest, rest]))
    scanner.start(0, RIGHT)
    assert not scanner.wants(RIGHT, 1)  # half of the pool and of the places is the others'
    scanner.outlook(np.array([0 * rest, rest]))
    scanner.looked = -1000
    assert scanner.wants(RIGHT, 1)
    scanner.start(1, RIGHT)
    assert scanner.wants(RIGHT, 2)
