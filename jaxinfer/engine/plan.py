"""What one device call is to do: the words between the planner and those who carry it out."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxinfer.engine.sequence import Sequence
from jaxinfer.schedule.demand import Span


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence from position `start` on, computed in one call.

    Attributes:
      decodes: each token is sampled by the step before it (else the tokens are known and computed at once).
      samples: the token after the last one is wanted.
      sparse: its one token, though known, attends as generated ones do: to the pages that it chooses.
    """

    sequence: Sequence
    start: int
    count: int
    decodes: bool = False
    samples: bool = True
    sparse: bool = False

    @property
    def span(self) -> Span:
        every = self.decodes or self.sequence.request.score
        logits = self.count if every else int(self.samples)
        return Span(self.start, self.count, logits, sparse=self.decodes or self.sparse)


@dataclass
class StepPlan:
    """One device call.

    Attributes:
      decodes: one chunk each per decoding sequence; its count is the number of steps it takes part in.
      prefills: chunks of prompts.
      steps: decode steps in this call; 1 when there are prefills or beams.
      copies: pages (from, to) that are copied before all else, at most one a beam.
    """

    decodes: list[Chunk] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    steps: int = 1
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def beams(self) -> list[Sequence]:
        """The beams that decode; their last tokens were chosen by the host."""
        return [chunk.sequence for chunk in self.decodes if chunk.sequence.beams is not None]

    @property
    def candidates(self) -> int:
        """Most next tokens that a beam has to be told of."""
        wanting = [chunk.sequence.beams for chunk in self.decodes + self.prefills if chunk.samples]
        return max((beams.candidates for beams in wanting if beams is not None), default=0)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class TokensNeeded(Exception):
    """Planning cannot go on before the tokens in flight are read: a sequence has to start again from all it has."""
