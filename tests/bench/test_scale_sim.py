"""A simulated worker takes the time that its steps take, and a simulated fleet answers every row whatever happens to its workers."""

import numpy as np
import pytest

from bench import scale_sim
from bench.simulated_worker import SimulatedWorker
from bench.traces import BURSTGPT, MMLU, OPENVID, WILDCHAT, build
from jaxinfer.schedule.fed import FedScanner
from jaxinfer.schedule.pool import SimulatedPool
from jaxinfer.schedule.profile import PRACTICAL
from jaxinfer.schedule.scanner import LEFT, RIGHT
from jaxinfer.schedule.workload import Sharing


def worker(prompt, output, *, capacity=1000, slots=8, max_tokens=16, prefix=0):
    """All of whose requests share one prefix; more of both sides are to come."""
    prompt, output = np.asarray(prompt), np.asarray(output)
    own, parent = np.array([0, prefix]), np.array([-1, 0])
    pool = SimulatedPool(own, parent, np.ones(len(prompt), int), prompt - prefix, capacity)
    ahead = np.array([slots, slots])
    scanner = FedScanner(3 * slots, 1.0, 2.0, capacity, slots, max_tokens, 1)
    scanner.outlook(np.array([[1e4, 1e2, 1e3], [1e2, 1e2, 1e4]]))
    return SimulatedWorker(scanner, pool, prompt, output, 1.0, 0.5, 2.0, 0.3, 0.0, slots, ahead)


def test_a_request_alone_takes_its_prompt_and_its_answer():
    one = worker([40], [5])
    one.send([0], LEFT)
    while one.here:
        one.step()
    steps = one.clock
    prompt = steps - 4  # as many tokens each as the weights' reading leaves free, for nothing is read yet
    assert prompt == 20
    decode = sum(PRACTICAL(2.0, 0.5 * (40 + made)) for made in range(1, 5))
    assert one.seconds == pytest.approx(2.0 * prompt + decode)
    assert one.collect().tolist() == [0] and one.here == 0
    assert one.spent == pytest.approx(40 + 4 + 0.5 * sum(40 + made for made in range(1, 5)))


def test_a_shared_prefix_is_computed_once_and_half_the_speed_takes_twice_as_long():
    times = []
    for speed in (1.0, 0.5):
        several = worker([40] * 6, [3] * 6, prefix=32)
        several.speed = speed
        several.send(range(6), LEFT)
        while several.here:
            several.step()
        assert several.prefilled == 32 + 6 * 8
        assert sorted(several.collect()) == list(range(6)) and several.pool.used == 32
        times.append(several.seconds)
    assert times[1] == pytest.approx(2 * times[0])


def test_a_pool_that_holds_two_runs_two_at_a_time_and_a_lost_process_gives_all_back():
    several = worker([10] * 5, [10] * 5, capacity=45)
    several.send(range(3), LEFT)
    several.send(range(3, 5), RIGHT)
    most = 0
    while several.finished < 3:
        several.step()
        most = max(most, several.fills + several.decodes)
        assert several.pool.used <= 45
        running = several.decoding[: several.decodes]
        assert several.keys == sum(10 + several.made(place) for place in running)
    done = several.collect().tolist()
    rows, seconds = several.lose()
    assert most == 2 and sorted([*done, *rows]) == list(range(5)) and seconds > 0
    assert several.pool.used == several.here == several.scanner.running == 0
    assert several.scanner.waiting.tolist() == [[0] * 3] * 2 and several.frees == len(several.free)


def test_where_answers_outgrow_the_pool_the_newest_begins_anew():
    several = worker([10] * 4, [30] * 4, capacity=100)
    several.scanner.root = 3.0  # all are taken for memory-heavy ones that fit
    several.scanner.length = several.scanner.length * 0
    several.send(range(4), LEFT)
    while several.here:
        several.scanner.length[:] = 1.0
        several.step()
        assert several.pool.used <= 100
    assert several.preemptions > 0 and sorted(several.collect()) == list(range(4))


def test_unwritten_tokens_share_as_written_ones():
    parts = [(BURSTGPT, 300), (MMLU, 300), (WILDCHAT, 300), (OPENVID, 20)]
    mixes = build(parts), build(parts, written=False)
    mine, theirs = (Sharing.of(mix.workload, 16) for mix in mixes)
    np.testing.assert_array_equal(mixes[0].workload.starts, mixes[1].workload.starts)
    assert mine.shared_tokens == pytest.approx(theirs.shared_tokens, rel=0.02)  # families are drawn anew
    at = mixes[1].workload.starts[:-1, None] + np.arange(17)
    assert (mixes[1].workload.tokens[at][:, :16] == mixes[0].workload.tokens[at][:, :16]).all()


def test_every_row_is_answered_by_workers_that_die_and_slow_down():
    result = scale_sim.run(quick=True, options=["--trace", "2", "--requests", "1000", "--workers", "3"])
    clean, troubled = result.rows
    assert clean["failures"] == 0 and clean["lost_rows"] == 0 and clean["sharing"] >= 0.97
    assert troubled["failures"] > 0 and troubled["lost_rows"] > 0 and troubled["lost_work"] > 0
    for row in result.rows:
        assert 0 < row["efficiency"] <= 1.05 and row["slowest_over_mean"] >= 1
        assert (
            0.8 < row["of_optimum"] / row["efficiency"] <= 1
        )  # of one worker; in the order of arrival it is 0.67
    assert result.summary["efficiency_3"] == troubled["efficiency"]
