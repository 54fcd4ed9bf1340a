"""A planned batch cut into units of work, each with the whole batch's mix of compute and memory time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.partition import assign
from jaxinfer.schedule.plan import Plan
from jaxinfer.schedule.workload import Sharing

_SLACK = 0.1  # of a unit, by which its ends may move so as not to cut through a subtree


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Requests in the order in which they are sent. Where the machine overlaps compute and memory time, each unit is two lines that
    are sent side by side: from the compute-heavy end of the plan, and from the memory-heavy one. 48 bytes a request.

    Attributes:
      line: int64 [requests to serve], their numbers.
      sides: lines of a unit, 1 or 2.
      starts: int64 [units * sides + 1], where each line begins in `line`; those of a unit stand beside each other.
      seconds: float64 [requests to serve + 1], expected compute and memory time of all before each place.
      work: float64 [requests to serve + 1, 3], expected tokens through the model, tokens of answers, and keys read of all before
        each place.
      common: int64 [requests to serve], tokens that a request shares with the one before it: what is computed again if the line
        is cut before it.
    """

    line: np.ndarray
    sides: int
    starts: np.ndarray
    seconds: np.ndarray
    work: np.ndarray
    common: np.ndarray

    @classmethod
    def cut(
        cls,
        plan: Plan,
        cost: Cost,
        outputs: np.ndarray,
        count: int,
        sharing: Sharing | None = None,
        *,
        turns: int = 1,
    ) -> Units:
        """`count` units by a dual scan, neighbours in the plan one after the other.

        Where nothing overlaps, each in depth-first order, memory-heavy requests that share next to nothing last (see
        `engine.apart`).

        Args:
          outputs: float64 [requests], expected tokens of each answer.
          sharing: gives the depth-first order; None is the plan's own.
          turns: units of each worker, one after the other; the longest requests are in first ones.
        """
        unit = assign(plan, cost, outputs, count, slack=_SLACK, turns=turns)
        late = np.zeros(len(unit), bool)
        place = np.arange(len(unit)) if sharing is None else sharing.rank
        sides = 1
        if cost.joint.overlaps:
            sides = 2
            late[plan.order] = plan.by_place(plan.density) < plan.root_density
            place = np.empty(len(unit), np.int64)
            place[plan.order] = np.arange(len(plan.order))
            place[late] *= -1  # the most memory-heavy first
        else:
            late[plan.loners(outputs)] = True
        line = plan.order[np.lexsort((place[plan.order], late[plan.order], unit[plan.order]))]
        lines = unit[line] * sides + (late[line] if sides > 1 else 0)
        each = plan.tree.requests(cost, outputs)
        work = np.stack([each.compute / cost.token_seconds, outputs, each.memory / cost.key_seconds], axis=1)
        common = np.zeros(len(line), np.int64)
        for places in (np.flatnonzero(~late[line]), np.flatnonzero(late[line])):
            common[places] = plan.tree.common(line[places])
        return cls(
            line=line,
            sides=sides,
            starts=np.searchsorted(lines, np.arange(count * sides + 1)),
            seconds=np.concatenate([[0.0], np.cumsum((each.compute + each.memory)[line])]),
            work=np.concatenate([np.zeros((1, 3)), np.cumsum(work[line], axis=0)]),
            common=common,
        )

    def side_of(self, count: int) -> np.ndarray:
        """int8 [count], by request, of `count` requests."""
        side = np.zeros(count, np.int8)
        lengths = np.diff(self.starts)
        side[self.line] = np.repeat(np.arange(len(lengths)) % self.sides, lengths)
        return side

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.sides
