"""What a report draws: counts over time and lengths, in bounded memory however long the run."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

_MAX_POINTS = 600
_MAX_STRETCHES = 100  # a chart is not wider, and shorter stretches are mostly noise

Stretch = tuple[float, float, float]
"""Start, end, and a value that holds between them."""


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
    interval: float = 0.05
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

    def knows(self, name: str) -> bool:
        """Whether anybody counted it."""
        return any(name in counters for _, counters in self.points)

    def rate(self, name: str) -> list[tuple[float, float]]:
        """(seconds, growth per second of a counter), in steps: the area below is the growth."""
        return steps((start, end, grown / (end - start)) for start, end, grown in self._growth(name))

    def ratio(self, name: str, of: str) -> list[tuple[float, float]]:
        """(seconds, growth of a counter over that of another), in steps, where the other one grows."""
        both = zip(self._growth(name), self._growth(of))
        return steps((start, end, part / whole) for (start, end, part), (*_, whole) in both if whole > 0)

    def level(self, name: str) -> list[tuple[float, float]]:
        """(seconds, value) of a gauge or a counter, in steps: what is seen at the end of a stretch."""
        return steps((start, end, after.get(name, 0)) for start, end, _, after in self._stretches())

    def _growth(self, name: str) -> list[Stretch]:
        return [
            (start, end, after.get(name, 0) - before.get(name, 0))
            for start, end, before, after in self._stretches()
        ]

    def _stretches(self) -> Iterator[tuple[float, float, dict[str, float], dict[str, float]]]:
        """Start, end, and what was counted at both."""
        points = self.points
        every = -(-len(points) // _MAX_STRETCHES)
        if every > 1:
            points = [*points[:-1:every], points[-1]]
        for (start, before), (end, after) in itertools.pairwise(points):
            if end > start:
                yield start, end, before, after


def steps(stretches: Iterable[Stretch]) -> list[tuple[float, float]]:
    """Points of a line that holds each value for as long as it holds."""
    return [(at, value) for start, end, value in stretches for at in (start, end)]
