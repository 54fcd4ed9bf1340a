"""The prefix tree of a whole batch, as arrays: one node for every stretch of pages that several prompts begin with.

BlendServe's resource-aware prefix tree (arXiv 2411.16102, section 5.1): each node knows the compute and memory time of
everything below it, with what its prompts share counted once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.workload import Sharing, Workload


class Totals(NamedTuple):
    """Seconds asked by each subtree (of nodes) or request: float64 arrays."""

    compute: np.ndarray
    memory: np.ndarray

    @property
    def density(self) -> np.ndarray:
        """Compute over memory; infinite where nothing is read."""
        compute, memory = np.broadcast_arrays(self.compute, self.memory)
        return np.divide(compute, memory, out=np.full(memory.shape, np.inf), where=memory > 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestTree:
    """Some 30 bytes a request and 32 bytes a node. Node 0 is the root, of no tokens; parents come before children.

    Attributes:
      order: int64 [requests] in depth-first order.
      first, last: int64 [nodes]; `order[first:last]` are the requests below a node.
      depth: int64 [nodes], tokens from the root to the node's end, whole pages.
      parent: int64 [nodes]; -1 for the root.
      attach: int64 [requests], by request, the deepest node that its prompt runs through.
      prompt: int64 [requests], prompt tokens.
    """

    order: np.ndarray
    first: np.ndarray
    last: np.ndarray
    depth: np.ndarray
    parent: np.ndarray
    attach: np.ndarray
    prompt: np.ndarray

    @classmethod
    def of(cls, workload: Workload, page_size: int) -> RequestTree:
        return cls.shared(workload, Sharing.of(workload, page_size), page_size)

    @classmethod
    def shared(cls, workload: Workload, sharing: Sharing, page_size: int) -> RequestTree:
        """From what is known to be shared."""
        order = np.argsort(sharing.rank, kind="stable")
        first, last, depth, parent, owner = _intervals(sharing.common)
        place = np.lexsort((depth, first))  # parents before children
        new = np.empty_like(place)
        new[place] = np.arange(len(place))
        after = np.append(sharing.common[1:], 0)
        deepest = np.where(sharing.common >= after, owner, np.append(owner[1:], 0))
        attach = np.empty_like(order)
        attach[order] = new[deepest]
        parent = np.where(parent[place] < 0, -1, new[parent[place]])
        return cls(
            order=order,
            first=first[place],
            last=last[place],
            depth=depth[place] * page_size,
            parent=parent,
            attach=attach,
            prompt=workload.prompt_tokens,
        )

    @property
    def own(self) -> np.ndarray:
        """int64 [nodes], tokens of the node's own stretch."""
        return self.depth - np.where(self.parent < 0, 0, self.depth[self.parent])

    @property
    def alone(self) -> np.ndarray:
        """int64 [requests], prompt tokens that no other request has."""
        return self.prompt - self.depth[self.attach]

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that need not be computed."""
        return int(self.prompt.sum() - self.alone.sum() - self.own.sum())

    def below(self, column: np.ndarray, of_nodes: np.ndarray | None = None) -> np.ndarray:
        """[nodes], the sum of a column of the requests below each node, and of its own and its descendants' `of_nodes`."""
        sums = np.concatenate([[0], np.cumsum(column[self.order])])
        total = sums[self.last] - sums[self.first]
        if of_nodes is not None:
            sums = np.concatenate([[0], np.cumsum(of_nodes)])
            total = total + sums[self.ends] - sums[:-1]
        return total

    @property
    def ends(self) -> np.ndarray:
        """int64 [nodes]: the nodes below node i are i + 1 .. ends[i] - 1."""
        return np.maximum(np.searchsorted(self.first, self.last), np.arange(len(self.first)) + 1)

    def requests(self, cost: Cost, outputs: np.ndarray) -> Totals:
        """Of each request with what it alone computes, by request."""
        return Totals(cost.compute(self.alone + outputs), cost.memory(self.prompt, outputs))

    def common(self, line: np.ndarray) -> np.ndarray:
        """int64 [requests of `line`], prompt tokens that each shares with the one before it in `line`; 0 for the first."""
        node = self.attach[line]
        above, below = node[:-1].copy(), node[1:].copy()
        apart = np.flatnonzero(above != below)
        while len(apart):  # a parent's number is smaller, so the larger one of two is not above the other
            first, second = above[apart], below[apart]
            above[apart] = np.where(first > second, self.parent[first], first)
            below[apart] = np.where(second > first, self.parent[second], second)
            apart = apart[above[apart] != below[apart]]
        return np.concatenate([np.zeros(min(len(line), 1), np.int64), self.depth[below]])

    def nodes(self, cost: Cost, outputs: np.ndarray) -> Totals:
        """Of each node's subtree; what is shared below it is computed once, what is above it is not counted."""
        each = self.requests(cost, outputs)
        compute = self.below(each.compute, cost.compute(self.own))
        return Totals(compute, self.below(each.memory))

    def arranged(self, of_nodes: np.ndarray, of_requests: np.ndarray) -> RequestTree:
        """The same tree with the children of every node, nodes and requests alike, in ascending order of their keys.

        Args:
          of_nodes, of_requests: keys, [nodes] and [requests] by request; ties stay as they are.
        """
        nodes, count = len(self.first), len(self.order)
        parent = np.concatenate([self.parent[1:], self.attach[self.order]])
        key = np.concatenate([of_nodes[1:], of_requests[self.order]])
        size = np.concatenate([(self.last - self.first)[1:], np.ones(count, np.int64)])
        at = np.concatenate([self.first[1:], np.arange(count)])
        level = self.levels[parent]
        line = np.lexsort((at, key, parent, level))
        before = np.cumsum(size[line]) - size[line]
        family = np.flatnonzero(np.diff(parent[line], prepend=-1))
        before -= np.repeat(before[family], np.diff(np.append(family, len(line))))
        start = np.zeros(nodes + count, np.int64)  # the root's, the other nodes', the requests'
        steps = np.searchsorted(level[line], np.arange(level.max(initial=-1) + 2))
        for low, high in pairwise(steps):
            items = line[low:high]
            start[items + 1] = start[parent[items]] + before[low:high]
        order = np.empty_like(self.order)
        order[start[nodes:]] = self.order
        return self._renumbered(order, start[:nodes])

    def _renumbered(self, order: np.ndarray, first: np.ndarray) -> RequestTree:
        place = np.lexsort((self.depth, first))
        new = np.empty_like(place)
        new[place] = np.arange(len(place))
        return replace(
            self,
            order=order,
            first=first[place],
            last=(first + self.last - self.first)[place],
            depth=self.depth[place],
            parent=np.where(self.parent[place] < 0, -1, new[self.parent[place]]),
            attach=new[self.attach],
        )

    @property
    def levels(self) -> np.ndarray:
        """int64 [nodes], nodes above each."""
        levels = np.zeros(len(self.first), np.int64)
        for node in range(1, len(levels)):
            levels[node] = levels[self.parent[node]] + 1
        return levels

    def by_arrival(self) -> RequestTree:
        """Children in the order in which the first of their requests came."""
        edges = np.stack([self.first, self.last], axis=1).ravel()
        first = np.minimum.reduceat(np.append(self.order, len(self.order)), edges)[::2]
        return self.arranged(first, np.arange(len(self.order)))


def _intervals(common: np.ndarray) -> tuple[np.ndarray, ...]:
    """The tree of runs of places that have so many pages in common: first, last, depth and parent of each, unsorted, the
    root first; and for each place the run that it and the one before it lie in."""
    count = len(common)
    first, last, depth, parent, stack = [0], [count], [0], [-1], [0]
    owner = np.zeros(count, np.int64)
    changes = np.flatnonzero(np.diff(common)) + 1
    for at, to in pairwise([*changes.tolist(), count]):
        pages, closed = int(common[at]), -1
        while depth[stack[-1]] > pages:
            node = stack.pop()
            last[node] = at
            if closed >= 0:
                parent[closed] = node
            closed = node
        if depth[stack[-1]] < pages:
            first.append(first[closed] if closed >= 0 else at - 1)
            last.append(count)
            depth.append(pages)
            parent.append(-1)
            stack.append(len(first) - 1)
        if closed >= 0:
            parent[closed] = stack[-1]
        owner[at:to] = stack[-1]
    for below, node in pairwise(stack):
        parent[node] = below
    return *(np.array(column, np.int64) for column in (first, last, depth, parent)), owner
