"""Cuts a planned batch into parts of equal time: for ranks that serve them side by side, or as units of work."""

from __future__ import annotations

import heapq

import numpy as np

from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.plan import Plan


def partition(plan: Plan, cost: Cost, outputs: np.ndarray, ranks: int) -> list[Plan]:
    """One plan a rank, each with its share of the compute and of the memory time; see `assign`."""
    rank = assign(plan, cost, outputs, ranks)
    return [plan.only(rank == number) for number in range(ranks)]


def assign(
    plan: Plan, cost: Cost, outputs: np.ndarray, ranks: int, *, slack: float = 0.0, turns: int = 1
) -> np.ndarray:
    """The rank of every request, taken from both ends like a dual scan (BlendServe, section 5.5): each rank gets its share of
    the compute from the left and of the memory time from the right, so that every part has the density of the whole.

    A prefix whose subtree is cut is computed by each rank that has a part of it. Memory-heavy requests that share next to
    nothing are dealt out first, longest first, each to the rank with the least memory time: no rank gets all the longest ones.

    Args:
      outputs: [requests], expected tokens of each answer.
      slack: share of a part by which a cut may move to where the requests on both sides share less.
      turns: ranks that follow each other are so many turns of one machine; the longest requests go to first turns, the shortest
        to last ones, so that no long one is begun late.

    Returns:
      int64 [requests], by request; -1 for those that the plan does not have.

    Raises:
      ValueError: fewer than one rank.
    """
    if not 1 <= turns <= ranks:
        raise ValueError(
            f"ranks = {ranks}, turns = {turns}: at least 1 is needed, and no more turns than ranks"
        )
    outputs = np.asarray(outputs, float)
    each = plan.tree.requests(cost, outputs)
    rank = np.full(len(plan.tree.order), -1)
    given = np.zeros((ranks, 2))
    alone = plan.loners(outputs)
    alone = alone[np.argsort(-each.memory[alone], kind="stable")]
    before = np.cumsum(each.memory[alone]) - each.memory[alone]
    turn = np.floor(before * turns / max(before[-1:].sum(), 1e-300)).clip(max=turns - 1)
    for at in range(turns):
        loads = [(0.0, number) for number in range(at, ranks, turns)]
        for request in alone[turn == at]:
            load, number = heapq.heappop(loads)
            heapq.heappush(loads, (load + each.memory[request], number))
            rank[request] = number
            given[number] += each.compute[request], each.memory[request]
    line = plan.order[rank[plan.order] < 0]
    scan = _DualScan(each.compute[line], each.memory[line])
    common = plan.tree.common(line) if slack else np.zeros(0, np.int64)
    whole = scan.total + given.sum(axis=0)
    for number in range(ranks - 1):
        start = scan.left, scan.right
        scan.cut(whole / ranks - given[number], whole)
        if slack:
            scan.snap(start, slack / ranks * whole, common)
        rank[line[start[0] : scan.left]] = rank[line[scan.right : start[1]]] = number
    rank[line[scan.left : scan.right]] = ranks - 1
    return rank


class _DualScan:
    """Two cursors over a line of requests, and the work between its start and every place."""

    def __init__(self, compute: np.ndarray, memory: np.ndarray):
        self._work = [np.concatenate([[0.0], np.cumsum(column)]) for column in (compute, memory)]
        self.total = np.array([column[-1] for column in self._work])
        self.left, self.right = 0, len(compute)

    def cut(self, take: np.ndarray, whole: np.ndarray) -> None:
        """Go on from both ends so that compute and memory both come closest to `take`."""
        memory = self._work[1]
        left, right, scale = self.left, self.right, np.maximum(whole, 1e-300)
        # Taking nothing misses by so much; what alone exceeds its share by more cannot be best.
        worst = (np.abs(take) / scale).sum()
        most = [column[left] + take[i] + worst * scale[i] for i, column in enumerate(self._work)]
        last = min(int(np.searchsorted(column, most[i], "right")) for i, column in enumerate(self._work))
        lefts = np.arange(left, min(max(last, left), right) + 1)
        # for every end of the left part, the right part that brings the memory time next to its share
        wanted = memory[right] - np.maximum(take[1] - (memory[lefts] - memory[left]), 0)
        above = np.clip(np.searchsorted(memory, wanted), lefts, right)
        below = np.maximum(above - 1, lefts)
        rights = np.where(wanted - memory[below] < memory[above] - wanted, below, above)
        missed = sum(
            np.abs(column[lefts] - column[left] + column[right] - column[rights] - take[i]) / scale[i]
            for i, column in enumerate(self._work)
        )
        best = int(np.argmin(missed))
        self.left, self.right = int(lefts[best]), int(rights[best])

    def snap(self, start: tuple[int, int], slack: np.ndarray, common: np.ndarray) -> None:
        """Move both cuts, by at most `slack` seconds, to where the requests beside them have least in common.

        Args:
          start: where the part begins at both ends.
          common: int64 [requests], tokens that each shares with the one before it.
        """
        left, right = self.left, self.right
        if start[0] < left < right:
            self.left = self._least(left, max(start[0], 0), right, slack, common)
        if self.left < right < start[1]:
            self.right = self._least(right, self.left, start[1], slack, common)

    def _least(self, at: int, low: int, high: int, slack: np.ndarray, common: np.ndarray) -> int:
        for column, most in zip(self._work, slack):
            low = max(low, int(np.searchsorted(column, column[at] - most)))
            high = min(high, int(np.searchsorted(column, column[at] + most, "right")) - 1)
        places = np.arange(max(low, 1), min(high, len(common) - 1) + 1)
        if not len(places):
            return at
        return int(places[np.lexsort((np.abs(places - at), common[places]))[0]])
