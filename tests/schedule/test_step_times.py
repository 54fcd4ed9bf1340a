"""Which way a step is run by what steps were measured to take, and what the simulator makes of it."""

import json

import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.schedule.step_times import StepShape, StepTimes, Timing, Way

KEYS = (0.0, 1000.0, 4000.0)


def timing(way, tokens, decodes, *seconds):
    return Timing(way, tokens, decodes, KEYS, seconds)


# One after the other 1 s and a millisecond a key; split 0.3 s more, but the keys cost only what the products do not hide.
TIMES = StepTimes(
    (
        timing(Way.WHOLE, 512, 128, 1.0, 2.0, 5.0),
        timing(Way.ATTENTION, 512, 128, 1.0, 1.9, 4.9),
        timing(Way.PRODUCT, 512, 128, 1.3, 1.4, 4.3),
        timing(Way.CHAINS, 512, 128, 1.4, 1.8, 4.6),
        timing(Way.WHOLE, 1024, 128, 2.0, 3.0, 6.0),
        timing(Way.PRODUCT, 1024, 128, 2.4, 2.5, 4.5),
    )
)


@pytest.mark.parametrize(
    "step, wanted",
    {
        (512, 100, 300, 1000): StepShape(Way.PRODUCT, 512, 128),
        (512, 100, 300, 100): StepShape(Way.WHOLE, 512),  # hardly anything to hide
        (1024, 100, 300, 4000): StepShape(Way.PRODUCT, 1024, 128),
        (512, 200, 300, 9000): StepShape(Way.WHOLE, 512),  # more decoding tokens than were measured
        (512, 0, 400, 0): StepShape(Way.WHOLE, 512),
        (256, 100, 100, 9000): StepShape(Way.WHOLE, 256),  # not measured
    }.items(),
)
def test_a_step_takes_the_way_that_is_the_fastest_for_it(step, wanted):
    assert TIMES.fastest(*step) == wanted


def test_seconds_between_and_beyond_the_measured_keys_lie_on_lines():
    plain = TIMES.timings[0]
    assert [plain.at(keys) for keys in (0, 500, 2500, 5000)] == [1.0, 1.5, 3.5, 6.0]
    assert timing(Way.WHOLE, 512, 128, 3.0, 1.0, 0.5).at(100_000) == 0


def test_only_programs_that_are_the_fastest_somewhere_may_be_asked_for():
    assert TIMES.shapes == {
        StepShape(Way.PRODUCT, 512, 128),
        StepShape(Way.PRODUCT, 1024, 128),
    }
    plain = StepTimes((timing(Way.WHOLE, 512, 128, 1, 2, 5), timing(Way.PRODUCT, 512, 128, 1.2, 1.99, 4.95)))
    assert not plain.shapes and plain.fastest(512, 100, 300, 4000) == StepShape(Way.WHOLE, 512)


def test_the_joint_time_is_fitted_to_the_fastest_way():
    one_by_one = StepTimes((timing(Way.WHOLE, 512, 128, 1, 2, 5),)).joint
    assert (one_by_one.linear, one_by_one.square) == pytest.approx((1.0, 0.0))
    hidden = StepTimes((timing(Way.WHOLE, 512, 128, 1, 2, 5), timing(Way.PRODUCT, 512, 128, 1.2, 1.25, 4.25)))
    joint = hidden.joint
    assert joint(1.0, 1.0) == pytest.approx(1.25) and joint(1.0, 4.0) == pytest.approx(4.25)


def test_a_table_is_kept_as_json():
    assert StepTimes.of(json.loads(json.dumps(StepTimes.rows(TIMES)))) == TIMES


@pytest.mark.parametrize(
    "timings, said",
    [
        ([Timing(Way.WHOLE, 512, 128, (0.0,), (1.0,))], "two or more ascending"),
        ([Timing(Way.WHOLE, 512, 128, (5.0, 1.0), (1.0, 2.0))], "two or more ascending"),
        ([timing(Way.WHOLE, 512, 128, 1, 2, float("inf"))], "not positive"),
        ([timing(Way.PRODUCT, 512, 128, 1, 2, 3)], "no plain step"),
    ],
)
def test_a_table_that_cannot_be_is_refused(timings, said):
    with pytest.raises(ConfigError, match=said):
        StepTimes(tuple(timings))
