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
    """Requests in the order in which they are sent, one unit after the other. 28 bytes a request.

    Attributes:
      line: int64 [requests to serve], their numbers.
      starts: int64 [units + 1], where each unit begins in `line`.
      seconds: float64 [requests to serve + 1], expected compute and memory time of all before each place.
      common: int64 [requests to serve], tokens that a request shares with the one that is sent before it from the same end of
        the plan: what is computed again if the line is cut before it.
    """

    line: np.ndarray
    starts: np.ndarray
    seconds: np.ndarray
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

        Where the machine overlaps both kinds of work, a unit is sent from both ends at once, so that any stretch of it has its
        mix; else in depth-first order, memory-heavy requests that share next to nothing last (see `engine.apart`).

        Args:
          outputs: float64 [requests], expected tokens of each answer.
          sharing: gives the depth-first order; None is the plan's own.
          turns: units of each worker, one after the other; the longest requests are in first ones.
        """
        unit = assign(plan, cost, outputs, count, slack=_SLACK, turns=turns)
        by_unit = np.argsort(unit[plan.order], kind="stable")
        line = plan.order[by_unit]
        starts = np.searchsorted(unit[line], np.arange(count + 1))
        each = plan.tree.requests(cost, outputs)
        if cost.joint.overlaps:
            late = np.zeros(len(line), bool)
            for first, last in zip(starts[:-1].tolist(), starts[1:].tolist()):
                part = line[first:last]
                order, late[first:last] = _from_both_ends(each.compute[part], each.memory[part])
                line[first:last] = part[order]
        else:
            alone = np.zeros(len(unit), bool)
            alone[plan.loners(outputs)] = True
            rank = np.arange(len(unit)) if sharing is None else sharing.rank
            line = line[np.lexsort((rank[line], alone[line], unit[line]))]
            late = alone[line]
        work = each.compute[line] + each.memory[line]
        common = np.zeros(len(line), np.int64)
        for places in (np.flatnonzero(~late), np.flatnonzero(late)):
            common[places] = plan.tree.common(line[places])
        return cls(line=line, starts=starts, seconds=np.concatenate([[0.0], np.cumsum(work)]), common=common)

    def __len__(self) -> int:
        return len(self.starts) - 1


def _from_both_ends(compute: np.ndarray, memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order in which a dual scan sends a unit whose requests stand in descending density, and which of them then come from
    its end. Both cursors have left the same surplus behind at any time, one of compute, the other of memory time."""
    surplus = np.cumsum(compute / max(compute.sum(), 1e-300) - memory / max(memory.sum(), 1e-300))
    middle = int(np.argmax(surplus)) + 1 if len(surplus) else 0
    left = np.maximum.accumulate(np.concatenate([[0.0], surplus[: max(middle - 1, 0)]])[:middle])
    right = np.maximum.accumulate(surplus[middle:][::-1])[::-1]
    from_end = np.arange(len(compute)) >= middle
    turn = np.where(from_end, len(compute) - np.arange(len(compute)), np.arange(len(compute)))
    order = np.lexsort((turn, np.concatenate([left, right])))
    return order, from_end[order]
