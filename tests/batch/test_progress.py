"""What people see while a run goes on."""

import io
import time

import numpy as np
import pytest
from rich.console import Console

from jaxinfer.batch.progress import Bar, Lines, duration, reporter
from jaxinfer.batch.tally import Tally
from jaxinfer.core import Usage
from jaxinfer.schedule.estimate import Estimate
from jaxinfer.schedule.workload import Sharing, Workload


def reading(size):
    return Tally(size=size, position=250, read=40)


def halfway():
    """20 of 40 rows of 100 tokens, of which 25 are shared, with answers of 10 tokens out of 20."""
    tally = Tally(size=1000, position=1000, read=40, started=time.monotonic() - 60)
    lengths = np.full(40, 100)
    workload = Workload(
        tokens=np.zeros(4000, np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        answer_limits=np.full(40, 20),
    )
    sharing = Sharing(rank=np.arange(40), common=np.zeros(40, np.int64), shared_tokens=1000)
    tally.plan(Estimate(workload, sharing), lambda: 1700)
    for _ in range(15):
        tally.answer(Usage(prompt_tokens=100, completion_tokens=10, cached_tokens=25), 20)
    tally.errors["invalid_json"] = 5
    return tally


def test_share_is_of_the_bytes_while_reading_and_of_the_work_after():
    assert reading(1000).share == 0.25
    assert reading(None).share is None and Tally(size=0).share == 1
    tally = halfway()
    assert tally.cached_share == 0.25
    assert tally.share == pytest.approx(1700 / (4000 - 1000 + 40 * 10))
    assert tally.seconds_left == pytest.approx(60, rel=0.01)


def test_share_is_whole_only_when_every_row_is_done():
    tally = halfway()
    tally.plan(tally.estimate, lambda: 1_000_000)
    assert 0.99 < tally.share < 1 and tally.seconds_left == 0
    tally.errors["invalid_json"] = 25
    assert tally.share == 1


@pytest.mark.parametrize("terminal, kind", [(True, Bar), (False, Lines)])
@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: reading(1000), ["reading: 40 rows", "25%"]),
        (lambda: reading(None), ["reading: 40 rows"]),
        (halfway, ["20 rows", "5 errors", "25% cached", "50%", " 6"]),
    ],
)
def test_bar_on_a_terminal_and_lines_elsewhere(terminal, kind, make, said):
    screen = io.StringIO()
    shown = reporter(make(), Console(file=screen, force_terminal=terminal, width=150))
    assert isinstance(shown, kind)
    shown.period = 0.01
    with shown:
        while said[0] not in screen.getvalue():
            pass
    assert all(text in screen.getvalue() for text in said)


@pytest.mark.parametrize(
    "seconds, said", [(7.4, "7 s"), (600, "10 min"), (3599, "1 h 0 min"), (12000, "3 h 20 min")]
)
def test_duration(seconds, said):
    assert duration(seconds) == said
