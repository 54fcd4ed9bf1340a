"""How the pocket model is trained: which batches, how fast, of which tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, int]  # sequences, tokens of each
LEARN = {"chunks": 4.0, "table": 4.0, "lines": 2.0, "story": 2.0, "passkey": 1.0, "needles": 0.5, "count": 0.3, "classify": 0.3, "plain": 0.3}  # fmt: skip
MIX = {"chunks": 0.5, "index": 3.0, "table": 0.7, "lines": 1.2, "story": 3.8, "passkey": 0.4, "needles": 0.9, "count": 0.4, "classify": 0.3, "plain": 0.5}  # fmt: skip
LONG = {"index": 0.5, "table": 0.5, "lines": 3.0, "story": 3.0, "passkey": 2.0, "needles": 1.2, "count": 0.2, "classify": 0.2, "plain": 0.3}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Consecutive steps of one kind.

    Attributes:
      shapes: of the batches, in turn.
      rates: Muon's learning rate at its first and last step, linear between.
      mix: how often each task is drawn.
    """

    steps: int
    shapes: tuple[Shape, ...]
    rates: tuple[float, float]
    mix: Mapping[str, float]


PLAN = (
    Stage(30, ((32, 128),), (0.0, 0.02), LEARN),
    Stage(250, ((32, 128),), (0.02, 0.02), LEARN),
    Stage(2500, ((8, 512), (8, 512), (8, 512), (32, 128)), (0.02, 0.016), MIX),
    Stage(600, ((8, 512), (4, 1024), (8, 512), (2, 2048)), (0.016, 0.007), MIX),
    Stage(400, ((8, 512), (2, 2048), (1, 4096), (8, 512), (1, 4096), (1, 8192)), (0.007, 0.0), LONG),
)


def at(plan: tuple[Stage, ...], step: int) -> tuple[Stage, Shape, float] | None:
    """Stage, shape and rate of a step; None after the last."""
    for stage in plan:
        if step < stage.steps:
            first, last = stage.rates
            rate = first + (last - first) * (step + 1) / stage.steps
            return stage, stage.shapes[step % len(stage.shapes)], rate
        step -= stage.steps
    return None
