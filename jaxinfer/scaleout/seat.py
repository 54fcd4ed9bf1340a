"""A worker's place in a fleet: the process that holds it now, what that was sent, and what all that held it have done."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.core import Completion
from jaxinfer.engine.metrics import LEVELS
from jaxinfer.scaleout.worker import Turn


@dataclass
class Seat:
    """Attributes:
    place: for people, where the process runs; empty while it loads.
    reply: what Ray will hand out of the call in progress.
    since: when that call was made.
    in_flight: request id -> number of the request, of those sent and not answered.
    slots: requests that its engine runs at once; 0 while it loads.
    waiting: requests of each side that it was sent and has not begun.
    rows, tokens, failures: of all processes so far.
    fruitless: starts in a row that ended without a finished row.
    """

    number: int
    actor: Any = None
    place: str = ""
    reply: Any = None
    since: float = 0.0
    in_flight: dict[str, int] = field(default_factory=dict)
    slots: int = 0
    waiting: tuple[int, int] = (0, 0)
    rows: int = 0
    tokens: int = 0
    failures: int = 0
    fruitless: int = 0
    began: float = 0.0
    _row_at_start: int = 0
    _metrics: dict[str, float] = field(default_factory=dict)
    _ended: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"worker {self.number}" + (f" ({self.place})" if self.place else "")

    def call(self, reply: Any) -> None:
        self.reply, self.since = reply, time.monotonic()

    def started(self, place: str, slots: int) -> None:
        self.place, self.slots, self._row_at_start = place, slots, self.rows
        self.waiting = 0, 0
        self.began = self.began or time.monotonic()

    def take(self, turn: Turn) -> list[Completion]:
        """Those completions that answer what it was sent."""
        self._metrics, self.waiting = turn.metrics, turn.waiting
        known = [each for each in turn.completions if self.in_flight.pop(each.request_id, None) is not None]
        self.rows += len(known)
        self.tokens += sum(each.usage.prompt_tokens + each.usage.completion_tokens for each in known)
        return known

    def ended(self) -> None:
        """The process is gone, with what it had been sent."""
        self.failures += 1
        worked = self.slots > 0 and self.rows > self._row_at_start
        self.fruitless = 0 if worked else self.fruitless + 1
        self._ended = {name: value for name, value in self.metrics().items() if name not in LEVELS}
        self.in_flight, self._metrics, self.slots, self.actor, self.reply = {}, {}, 0, None, None

    def metrics(self) -> dict[str, float]:
        """The counters of all its engines, and the gauges of the one that runs."""
        now = {name: value + self._ended.get(name, 0) for name, value in self._metrics.items()}
        return self._ended | now

    @property
    def tokens_per_s(self) -> float:
        """Of prompts and answers, since it first began."""
        return self.tokens / max(time.monotonic() - self.began, 1e-9) if self.began else 0.0
