"""Cuts a planned batch into parts of equal time for ranks that serve it side by side."""

from __future__ import annotations

import numpy as np

from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.plan import Plan


def partition(plan: Plan, cost: Cost, outputs: np.ndarray, ranks: int) -> list[Plan]:
    """One plan a rank, taken from both ends like a dual scan (BlendServe, section 5.5): each rank gets its share of the compute
    from the left and of the memory time from the right, so that every part has the density of the whole.

    A prefix whose subtree is cut is computed by each rank that has a part of it.

    Args:
      outputs: [requests], expected tokens of each answer.

    Raises:
      ValueError: fewer than one rank.
    """
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: at least 1 is needed")
    each = plan.tree.requests(cost, np.asarray(outputs, float))
    compute, memory = each.compute[plan.order], each.memory[plan.order]
    from_left = np.concatenate([np.zeros((1, 2)), np.cumsum(np.stack([compute, memory], 1), axis=0)])
    whole = from_left[-1]
    rank = np.empty(len(plan.order), np.int64)
    left, right = 0, len(plan.order)
    for number in range(ranks - 1):
        take = whole / ranks
        start = left, right
        left, right = _cut(from_left, left, right, take)
        rank[start[0] : left] = rank[right : start[1]] = number
    rank[left:right] = ranks - 1
    of_request = np.empty_like(rank)
    of_request[plan.order] = rank
    return [plan.only(of_request == number) for number in range(ranks)]


def _cut(from_left: np.ndarray, left: int, right: int, take: np.ndarray) -> tuple[int, int]:
    """How far to go from both ends so that compute and memory both come closest to `take`."""
    lefts = np.arange(left, right + 1)
    have = from_left[lefts] - from_left[left]
    # for every end of the left part, the right part that brings the memory time to its share
    wanted = from_left[right, 1] - np.maximum(take[1] - have[:, 1], 0)
    rights = np.clip(np.searchsorted(from_left[:, 1], wanted), lefts, right)
    total = have + from_left[right] - from_left[rights]
    scale = np.maximum(take, 1e-300)
    best = int(np.argmin(np.abs(total / scale - 1).sum(axis=1)))
    return int(lefts[best]), int(rights[best])
