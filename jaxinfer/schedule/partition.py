"""Cuts a planned batch into parts of equal time for ranks that serve it side by side."""

from __future__ import annotations

import heapq

import numpy as np

from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.plan import Plan


def partition(plan: Plan, cost: Cost, outputs: np.ndarray, ranks: int) -> list[Plan]:
    """One plan a rank, taken from both ends like a dual scan (BlendServe, section 5.5): each rank gets its share of the compute
    from the left and of the memory time from the right, so that every part has the density of the whole.

    A prefix whose subtree is cut is computed by each rank that has a part of it. Memory-heavy requests that share next to
    nothing are dealt out first, longest first, each to the rank with the least memory time: no rank gets all the longest ones.

    Args:
      outputs: [requests], expected tokens of each answer.

    Raises:
      ValueError: fewer than one rank.
    """
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: at least 1 is needed")
    outputs = np.asarray(outputs, float)
    each = plan.tree.requests(cost, outputs)
    rank = np.full(len(plan.tree.order), -1)
    given = np.zeros((ranks, 2))
    loads = [(0.0, number) for number in range(ranks)]
    alone = plan.loners(outputs)
    for request in alone[np.argsort(-each.memory[alone], kind="stable")]:
        load, number = heapq.heappop(loads)
        heapq.heappush(loads, (load + each.memory[request], number))
        rank[request] = number
        given[number] += each.compute[request], each.memory[request]
    line = plan.order[rank[plan.order] < 0]
    work = np.stack([each.compute[line], each.memory[line]], axis=1)
    from_left = np.concatenate([np.zeros((1, 2)), np.cumsum(work, axis=0)])
    whole = from_left[-1] + given.sum(axis=0)
    left, right = 0, len(line)
    for number in range(ranks - 1):
        start = left, right
        left, right = _cut(from_left, left, right, whole / ranks - given[number], whole)
        rank[line[start[0] : left]] = rank[line[right : start[1]]] = number
    rank[line[left:right]] = ranks - 1
    return [plan.only(rank == number) for number in range(ranks)]


def _cut(
    from_left: np.ndarray, left: int, right: int, take: np.ndarray, whole: np.ndarray
) -> tuple[int, int]:
    """How far to go from both ends so that compute and memory both come closest to `take`."""
    lefts = np.arange(left, right + 1)
    have = from_left[lefts] - from_left[left]
    # for every end of the left part, the right part that brings the memory time next to its share
    memory = from_left[:, 1]
    wanted = memory[right] - np.maximum(take[1] - have[:, 1], 0)
    above = np.clip(np.searchsorted(memory, wanted), lefts, right)
    below = np.maximum(above - 1, lefts)
    rights = np.where(wanted - memory[below] < memory[above] - wanted, below, above)
    total = have + from_left[right] - from_left[rights]
    best = int(np.argmin((np.abs(total - take) / np.maximum(whole, 1e-300)).sum(axis=1)))
    return int(lefts[best]), int(rights[best])
