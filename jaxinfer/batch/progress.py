"""How far a run is: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import threading
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from jaxinfer.batch.tally import Tally


class Reporter(Protocol):
    """Shows a tally while it is entered."""

    def __enter__(self) -> object: ...
    def __exit__(self, *_) -> None: ...


class _Periodic:
    """Calls `_show` every `period` seconds from a thread of its own, so that a long step does not silence it."""

    period = 60.0

    def __init__(self, tally: Tally, console: Console):
        self._tally, self._console = tally, console
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="progress", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._done.wait(self.period):
            self._show()

    def _show(self) -> None:
        raise NotImplementedError


class Lines(_Periodic):
    """A line a minute."""

    def _show(self) -> None:
        share = self._tally.share
        done = "" if share is None else f"{share:.0%} done, "
        self._console.print(f"{done}{state(self._tally)}", highlight=False, soft_wrap=True)


class Bar(_Periodic):
    """A bar over the input while it is read, then over the work; an endless one while a pipe is read."""

    period = 0.25

    def __init__(self, tally: Tally, console: Console):
        super().__init__(tally, console)
        self._progress = Progress(
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self):
        self._progress.start()
        return super().__enter__()

    def __exit__(self, *_) -> None:
        super().__exit__()
        self._progress.stop()

    def _show(self) -> None:
        share = self._tally.share
        total = None if share is None else 1.0
        self._progress.update(
            self._task, total=total, completed=share or 0.0, description=state(self._tally), refresh=True
        )


def state(tally: Tally) -> str:
    """What a run is doing, in one line."""
    if tally.estimate is None:
        return f"reading: {tally.read:,} rows"
    prompt_rate, generated_rate = tally.rates()
    errors = f", {count:,} errors" if (count := tally.all_errors.total()) else ""
    left = "" if (seconds := tally.seconds_left) is None else f", {duration(seconds)} left"
    workers = "" if tally.workers is None else f", {tally.workers()}"
    return (
        f"{tally.rows:,} rows{errors}, tokens/s {prompt_rate:,.0f} in ({tally.cached_share:.0%} cached) "
        f"{generated_rate:,.0f} out{left}{workers}"
    )


def duration(seconds: float) -> str:
    """Two units at most: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def reporter(tally: Tally, console: Console) -> Reporter:
    return Bar(tally, console) if console.is_terminal else Lines(tally, console)
