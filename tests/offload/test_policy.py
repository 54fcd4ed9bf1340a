"""The policies against Algorithm 1's cases, each other, and brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.offload import policy
from jaxinfer.offload.latency import Costs, Engine
from jaxinfer.offload.timeline import Load, Split, device_seconds, seconds, serial_seconds, worth_ahead

# The constants of the authors' released code: host 7 a token, a missing expert 70 on the device.
RELEASED = Costs(host=Engine(7.0, 7.0), device=Engine(0.0, 0.0), link=70.0, ask=0.0)


@pytest.mark.parametrize(
    "tokens, resident, expected",
    [
        ([0, 0, 0], [0, 0, 0], Split()),
        ([0, 5, 0], [0, 1, 0], Split()),
        ([1, 1, 0], [0, 0, 0], Split(host=(0, 1))),
        ([9, 10, 11], [0, 0, 0], Split(host=(0, 1), stream=(2,))),  # 7 * 10 > 70 is false
        ([9, 10, 11], [0, 0, 1], Split(host=(0, 1))),
        ([500, 1, 300], [0, 0, 0], Split(host=(1,), stream=(0, 2))),
        ([500, 1, 300], [1, 1, 1], Split()),
    ],
)
def test_fiddler_decides_as_algorithm_1(tokens, resident, expected):
    load = Load(np.array(tokens), np.array(resident, bool))
    assert policy.fiddler(load, RELEASED) == expected


def test_fiddler_counts_the_devices_time_of_a_streamed_expert():
    costs = Costs(host=Engine(1.0, 0.1), device=Engine(2.0, 0.0), link=8.0)
    load = Load(np.array([10, 11]), np.zeros(2, bool))
    assert policy.fiddler(load, costs) == Split(host=(0,), stream=(1,))


def _random(rng, experts):
    kind = rng.integers(4)
    if kind == 0:
        tokens = rng.integers(0, 3, experts)
    elif kind == 1:
        tokens = rng.integers(0, 64, experts)
    elif kind == 2:
        tokens = rng.geometric(0.02, experts) - 1
    else:
        tokens = rng.integers(0, 2000, experts)
    flat, device_flat = 10.0 ** rng.uniform(-3, -1), 10.0 ** rng.uniform(-5, -2)
    costs = Costs(
        host=Engine(flat, flat * 10.0 ** rng.uniform(-2.5, 0)),
        device=Engine(device_flat, device_flat * 10.0 ** rng.uniform(-4, -0.5)),
        link=10.0 ** rng.uniform(-3, -1),
        ask=float(rng.choice([0.0, np.inf])),
    )
    return Load(tokens, rng.random(experts) < rng.random()), costs


def test_balanced_is_never_slower_than_fiddler():
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        load, costs = _random(rng, int(rng.choice([8, 16, 64])))
        ours, theirs = policy.balanced(load, costs), policy.fiddler(load, costs)
        assert sorted(ours.host + ours.stream) == sorted(load.missing)
        assert (
            seconds(load, ours, costs) * (1 - 1e-12)
            <= seconds(load, theirs, costs)
            <= serial_seconds(load, theirs, costs) * (1 + 1e-12)
        )


def test_balanced_is_within_5_percent_of_the_best_split():
    rng = np.random.default_rng(1)
    worst = 1.0
    for _ in range(600):
        load, costs = _random(rng, 7)
        missing = [int(expert) for expert in load.missing]
        best = min(
            seconds(load, Split(tuple(e for e in missing if e not in chosen), chosen), costs)
            for count in range(len(missing) + 1)
            for chosen in itertools.combinations(missing, count)
        )
        worst = max(worst, seconds(load, policy.balanced(load, costs), costs) / best if best else 1.0)
    assert worst <= 1.05


def test_what_is_brought_ahead_never_costs_more_than_it_can_spare():
    rng = np.random.default_rng(3)
    counts = []
    for _ in range(2000):
        load, costs = _random(rng, 8)
        costs, (following, _) = replace(costs, ask=0.0), _random(rng, 8)
        split = policy.balanced(load, costs)
        count = worth_ahead(load, split, following, costs)
        spared = costs.host.seconds(following.tokens[following.missing[:count]]).sum()
        now = max(seconds(load, split, costs), device_seconds(load, split, costs) + count * costs.link)
        assert now - seconds(load, split, costs) <= spared / 2
        counts.append(count)
    assert 0.05 < np.mean(np.array(counts) > 0) < 0.95


def test_stream_and_host_take_all_that_is_missing():
    load = Load(np.array([3, 0, 7, 2]), np.array([False, False, False, True]))
    assert policy.stream(load, RELEASED) == Split(stream=(2, 0))
    assert policy.host(load, RELEASED) == Split(host=(2, 0))


def test_the_best_prefix_is_the_simulators():
    rng = np.random.default_rng(2)
    for _ in range(300):
        load, costs = _random(rng, 9)
        missing = [int(expert) for expert in load.missing]
        times = [
            seconds(load, Split(tuple(missing[k:]), tuple(missing[:k])), costs)
            for k in range(len(missing) + 1)
        ]
        assert seconds(load, policy.balanced(load, costs), costs) <= min(times) * (1 + 1e-12)


def test_without_a_link_the_host_computes_all_that_is_missing():
    costs = Costs(host=Engine(1.0, 0.5), device=Engine(0.1, 0.01), link=float("inf"))
    load = Load(np.array([500, 0, 7, 2]), np.array([False, False, False, True]))
    for decide in (policy.balanced, policy.fiddler):
        assert decide(load, costs) == Split(host=(0, 2))
