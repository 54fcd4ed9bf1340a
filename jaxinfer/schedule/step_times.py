"""How long mixed steps take each way that they can be run: measured once a machine and model, asked before every step.

What compute and memory take together in the simulator (`Joint`) is fitted to the same table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.schedule.profile import Joint

_WORTH = 0.98  # of the plain way's time: what is saved must be more than what measuring may err by


class Way(StrEnum):
    """How the prefill and the decode attention of a mixed step go together.

    WHOLE runs one operation after the other. ATTENTION puts the attention of both into one launch. The others split the
    step into two nano-batches (NanoFlow, arXiv 2408.12757), decoding tokens first: their attention runs beside the
    other's widest product, in one launch (PRODUCT), or as independent chains that the device may run at once (CHAINS).
    """

    WHOLE = "whole"
    ATTENTION = "attention"
    PRODUCT = "product"
    CHAINS = "chains"

    @property
    def in_two(self) -> bool:
        return self in (Way.PRODUCT, Way.CHAINS)


class StepShape(NamedTuple):
    """Attributes:
    way: of a program.
    tokens: that a step is padded to.
    first: of these, the first nano-batch: the decoding ones and as many others as fill it; 0 for a way that does not split.
    """

    way: Way
    tokens: int
    first: int = 0


WHOLE = Way.WHOLE


class Timing(NamedTuple):
    """Attributes:
    way, tokens: of the step.
    decodes: its decoding tokens, which in a split step are the first nano-batch.
    keys: that these read, ascending; two or more.
    seconds: of the step with so many.
    """

    way: Way
    tokens: int
    decodes: int
    keys: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, keys: float) -> float:
        """Seconds with so many keys read; along the last line beyond the measured ones."""
        last = min(max(int(np.searchsorted(self.keys, keys)), 1), len(self.keys) - 1)
        (k0, k1), (s0, s1) = self.keys[last - 1 : last + 1], self.seconds[last - 1 : last + 1]
        return max(s0 + (keys - k0) * (s1 - s0) / (k1 - k0), 0.0)


@dataclass(frozen=True)
class StepTimes:
    """A table of `Timing`s.

    Raises:
      ConfigError: one that does not ascend, or a split or overlapped step without its plain one to compare.
    """

    timings: tuple[Timing, ...]

    def __post_init__(self):
        for each in self.timings:
            rises = all(a < b for a, b in zip(each.keys, each.keys[1:]))
            if len(each.keys) < 2 or len(each.keys) != len(each.seconds) or not rises:
                raise ConfigError(
                    f"step times: {each} needs two or more ascending keys, and seconds for each"
                )
            if not all(math.isfinite(second) and second > 0 for second in each.seconds):
                raise ConfigError(f"step times: {each} has seconds that are not positive")
            if (WHOLE, each.tokens, each.decodes) not in self._found:
                raise ConfigError(f"step times: {each} has no plain step to be compared with")

    @cached_property
    def _found(self) -> Mapping[tuple[Way, int, int], Timing]:
        return {(each.way, each.tokens, each.decodes): each for each in self.timings}

    @cached_property
    def _pairs(self) -> Sequence[tuple[int, int]]:
        """Tokens and decoding ones of the measured steps."""
        return sorted({(each.tokens, each.decodes) for each in self.timings})

    @cached_property
    def shapes(self) -> frozenset[StepShape]:
        """The programs that are the fastest for some measured step, plain ones left out: all that `fastest` may name."""
        plain = [each for each in self.timings if each.way is WHOLE]
        best = {self._best(each.tokens, each.decodes, keys) for each in plain for keys in each.keys}
        return frozenset(shape for shape in best if shape.way is not WHOLE)

    def fastest(self, tokens: int, decodes: int, prefill: int, keys: float) -> StepShape:
        """The program for a step.

        Args:
          tokens: that the plain step is padded to.
          decodes, prefill: its decoding tokens, and the others.
          keys: that the decoding ones read.

        Returns:
          the plain one where that is as fast, or where nothing was measured.
        """
        plain = StepShape(WHOLE, tokens)
        rooms = [room for size, room in self._pairs if size == tokens and room >= decodes]
        if not (decodes and prefill and rooms):
            return plain
        return self._best(tokens, min(rooms), keys, self.shapes)

    def _best(
        self, tokens: int, room: int, keys: float, among: frozenset[StepShape] | None = None
    ) -> StepShape:
        best, least = StepShape(WHOLE, tokens), _WORTH * self._found[WHOLE, tokens, room].at(keys)
        for way in Way:
            shape = StepShape(way, tokens, room if way.in_two else 0)
            timing = self._found.get((way, tokens, room))
            if timing is not None and (among is None or shape in among) and timing.at(keys) < least:
                best, least = shape, timing.at(keys)
        return best

    @cached_property
    def joint(self) -> Joint:
        """Fitted to the fastest way of every measured step. Its compute is the plain step that reads no keys, its memory time
        what reading them adds to that."""
        points = []
        for plain in self.timings:
            if plain.way is WHOLE:
                alike = [each for each in self.timings if each[1:3] == plain[1:3]]
                compute = plain.at(0)
                for keys, seconds in zip(plain.keys, plain.seconds):
                    if seconds > compute > 0:
                        joint = min(each.at(keys) for each in alike)
                        points.append((compute, seconds - compute, joint))
        return Joint.fit(points)

    def rows(self) -> list[dict[str, Any]]:
        """For JSON; `of` reads them."""
        return [each._asdict() for each in self.timings]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> StepTimes:
        """Raises ConfigError, ValueError, TypeError or KeyError for what `rows` did not make."""
        return cls(
            tuple(
                Timing(
                    Way(row["way"]), row["tokens"], row["decodes"], tuple(row["keys"]), tuple(row["seconds"])
                )
                for row in rows
            )
        )
