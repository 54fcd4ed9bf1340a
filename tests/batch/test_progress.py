"""What people see while a run goes on."""

import io

import pytest
from rich.console import Console

from jaxinfer.batch.progress import Bar, Lines, reporter
from jaxinfer.batch.tally import Tally
from jaxinfer.core import Usage


def halfway(size=1000):
    tally = Tally(size=size, position=500, read=40)
    for _ in range(15):
        tally.answer(Usage(prompt_tokens=100, completion_tokens=10, cached_tokens=25))
    tally.errors["invalid_json"] = 5
    return tally


def test_share_counts_finished_rows_of_all_that_the_file_will_have():
    assert halfway().share == 20 / 80
    assert halfway(size=None).share is None and Tally(size=0).share == 0
    assert halfway().cached_share == 0.25


@pytest.mark.parametrize("terminal, kind", [(True, Bar), (False, Lines)])
@pytest.mark.parametrize("size", [1000, None])
def test_bar_on_a_terminal_and_lines_elsewhere(terminal, kind, size):
    screen = io.StringIO()
    shown = reporter(halfway(size), Console(file=screen, force_terminal=terminal, width=150))
    assert isinstance(shown, kind)
    shown.period = 0.01
    with shown:
        while "20 rows" not in screen.getvalue():
            pass
    assert "5 errors" in screen.getvalue() and "25% cached" in screen.getvalue()
    assert ("25%" in screen.getvalue().replace("25% cached", "")) == (size is not None)
