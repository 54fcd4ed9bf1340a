"""Beam search by itself: which hypotheses go on and which are answers, from the candidates of each step.

As `generate(num_beams=..., do_sample=False)` of transformers 5 does it: of all continuations of all beams the best `width` that
do not end go on; those that end within the best `width` are answers, ranked by their log-probability over the number of
their tokens to the power of `length_penalty`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxinfer.core import TokenLogprob


@dataclass(frozen=True)
class Trail:
    """A hypothesis as its last token and the hypothesis before it, which others share."""

    entry: TokenLogprob
    before: Trail | None
    length: int = 1

    def entries(self) -> list[TokenLogprob]:
        """Its tokens from the first on."""
        return [trail.entry for trail in self._backwards()][::-1]

    def _backwards(self) -> Iterator[Trail]:
        trail: Trail | None = self
        while trail is not None:
            yield trail
            trail = trail.before


class Answer(NamedTuple):
    """score: log-probability over length to the power of the penalty."""

    trail: Trail
    score: np.float32


class Pick(NamedTuple):
    """A beam of the next step: which of the present ones it continues, and with which token."""

    parent: int
    token: int


class Candidates(NamedTuple):
    """The likeliest next tokens of one beam, likeliest first: ids int32 [C] (negative for none), logprobs float32 [C]."""

    ids: np.ndarray
    logprobs: np.ndarray


class BeamSearch:
    """One search.

    Args:
      width: beams.
      most: tokens of an answer; one that has so many ends there.
      stop_ids: tokens that end an answer.
      fewest: tokens before which it does not end.
      length_penalty: above 0 favours long answers, below 0 short ones.
      early_stopping: True ends the search at `width` answers; False when the best beam, at its present length, cannot beat the
        worst of them; "never" when it could not at any length.
      alternatives: of the likeliest tokens, how many to keep beside each chosen one.

    Attributes:
      answers: the best so far, at most `width`, best first.
      over: whether the search has ended.
    """

    def __init__(
        self,
        width: int,
        most: int,
        stop_ids: frozenset[int],
        *,
        fewest: int = 0,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        alternatives: int = 0,
    ):
        self.width, self.most, self.fewest = width, most, fewest
        self.answers: list[Answer] = []
        self.over = False
        self._stop_ids = np.array(sorted(stop_ids), np.int64)
        self._penalty, self._early, self._alternatives = length_penalty, early_stopping, alternatives
        self._trails: list[Trail | None] = [None]
        self._scores = np.zeros(1, np.float32)
        self._length = 0

    @property
    def candidates_needed(self) -> int:
        """How many of each beam: those that go on are among the best `width` that do not end, answers among the best `width`."""
        return self.width + len(self._stop_ids)

    def step(self, beams: list[Candidates]) -> list[Pick]:
        """The beams of the next step, best first; none once the search is over.

        Args:
          beams: of the present ones, in their order.
        """
        parents, ids, logprobs = self._joined(beams)
        scores = self._scores[parents] + logprobs
        length = self._length + 1
        stops = np.isin(ids, self._stop_ids)
        possible = np.isfinite(scores) & ~(stops & (length <= self.fewest))
        order = np.argsort(-scores, kind="stable")
        order = order[possible[order]]
        ends = stops[order] | (length == self.most)
        for place in order[: self.width][ends[: self.width]]:
            trail = self._trail(beams, int(parents[place]), int(ids[place]), logprobs[place])
            self.answers.append(Answer(trail, self._normalized(scores[place], length)))
        self.answers = sorted(self.answers, key=lambda answer: -answer.score)[: self.width]
        going = order[~ends][: self.width]
        picks = [Pick(int(parents[place]), int(ids[place])) for place in going]
        self._trails = [
            self._trail(beams, *pick, logprobs[place]) for pick, place in zip(picks, going, strict=True)
        ]
        self._scores, self._length = scores[going], length
        self.over = not picks or self._is_settled()
        return [] if self.over else picks

    def _joined(self, beams: list[Candidates]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = [int((beam.ids >= 0).sum()) for beam in beams]
        parents = np.repeat(np.arange(len(beams)), counts)
        ids = np.concatenate([beam.ids[:count] for beam, count in zip(beams, counts, strict=True)])
        logprobs = np.concatenate([beam.logprobs[:count] for beam, count in zip(beams, counts, strict=True)])
        return parents, ids, logprobs.astype(np.float32)

    def _trail(self, beams: list[Candidates], parent: int, token: int, logprob: np.float32) -> Trail:
        beam, top = beams[parent], self._alternatives
        pairs = zip(beam.ids[:top].tolist(), beam.logprobs[:top].tolist())
        entry = TokenLogprob(token, float(logprob), tuple(pair for pair in pairs if pair[0] >= 0))
        return Trail(entry, self._trails[parent], self._length + 1)

    def _normalized(self, score: np.float32, length: int) -> np.float32:
        return np.float32(score / np.float32(length**self._penalty))

    def _is_settled(self) -> bool:
        """Whether there are answers enough and what goes on will not be better."""
        if len(self.answers) < self.width:
            return False
        if self._early is True:
            return True
        length = self.most if self._early == "never" and self._penalty > 0 else self._length
        return bool(self._normalized(self._scores[0], length) <= self.answers[-1].score)
