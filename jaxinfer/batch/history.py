"""What a report draws: counts over time and lengths, in bounded memory however long the run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

_MAX_POINTS = 600


@dataclass(slots=True)
class History:
    """Points of (seconds, counters), thinned by two whenever there are too many, and histograms of lengths.

    Attributes:
      points: counters only grow, so a rate over any stretch is exact however it was thinned.
      prompt_lengths, answer_lengths: rows by power of two: bin b holds lengths in [2^(b-1), 2^b).
    """

    points: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    answer_lengths: Counter[int] = field(default_factory=Counter)
    interval: float = 0.5
    _started: float = field(default_factory=time.monotonic)
    _due: float = 0.0

    def due(self) -> bool:
        return time.monotonic() - self._started >= self._due

    def sample(self, counters: Mapping[str, float]) -> None:
        now = time.monotonic() - self._started
        self.add(now, counters)
        self._due = now + self.interval

    def add(self, seconds: float, counters: Mapping[str, float]) -> None:
        if len(self.points) > 1 and seconds - self.points[-1][0] < self.interval / 2:
            self.points.pop()  # over a short stretch, such as the last one, a rate is only noise
        self.points.append((seconds, dict(counters)))
        if len(self.points) > _MAX_POINTS:
            self.points = [*self.points[:-1:2], self.points[-1]]
            self.interval *= 2

    def lengths(self, prompt_tokens: int, answer_tokens: int) -> None:
        self.prompt_lengths[prompt_tokens.bit_length()] += 1
        self.answer_lengths[answer_tokens.bit_length()] += 1

    def rate(self, name: str) -> list[tuple[float, float]]:
        """(seconds, growth per second of a counter) between neighbouring points."""
        return [
            ((start + end) / 2, (after.get(name, 0) - before.get(name, 0)) / (end - start))
            for (start, before), (end, after) in zip(self.points, self.points[1:])
            if end > start
        ]

    def level(self, name: str) -> list[tuple[float, float]]:
        return [(seconds, counters.get(name, 0)) for seconds, counters in self.points]
