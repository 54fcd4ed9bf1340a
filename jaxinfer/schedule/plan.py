"""The order of a whole batch for two cursors: compute-heavy subtrees at one end, memory-heavy ones at the other.

BlendServe's sorting and splitting (arXiv 2411.16102, section 5.2): subtrees are sorted by compute density; a node is taken apart
where computing its prefix again for each child costs little, so that 99 % of what is shared stays shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.tree import RequestTree

_MOST_SPLIT = 0.01  # of the requests, taken out of a subtree as outliers
_LITTLE = 0.01  # of its tokens, that a request may share and still be served apart from the others
_FINEST = 1 / 512  # of the batch's time: smaller neighbours make one unit


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Units of requests that stay together, in descending compute density.

    Attributes:
      order: int64 [requests].
      starts: int64 [units + 1], where each unit begins in `order`.
      density: float64 [units], compute over memory time.
      root_density: of the whole batch.
      split: requests taken out of a subtree that they share something with.
      recomputed: tokens of prefixes that are computed more than once for it.
      tree: the prefix tree, children in descending density.
    """

    order: np.ndarray
    starts: np.ndarray
    density: np.ndarray
    root_density: float
    split: int
    recomputed: int
    tree: RequestTree

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that need not be computed when every unit is served in one piece."""
        return self.tree.shared_tokens - self.recomputed

    def only(self, chosen: np.ndarray) -> Plan:
        """The plan of some requests, in the same units.

        Args:
          chosen: bool [requests], by request.
        """
        stays = chosen[self.order]
        places = np.concatenate([[0], np.cumsum(stays)])[self.starts]
        full = np.flatnonzero(np.diff(places))
        return replace(
            self,
            order=self.order[stays],
            starts=np.append(places[full], places[-1]),
            density=self.density[full],
        )

    def loners(self, outputs: np.ndarray) -> np.ndarray:
        """Requests in memory-heavy units that share next to nothing, in the plan's order: they may start at any time.

        Args:
          outputs: float64 [requests], expected tokens of each answer.
        """
        heavy = self.order[self.by_place(self.density) < self.root_density]
        prefix = self.tree.depth[self.tree.attach[heavy]]
        return heavy[prefix <= _LITTLE * (self.tree.prompt + outputs)[heavy]]

    def by_place(self, of_units: np.ndarray) -> np.ndarray:
        """[requests], the value of the unit at each place of `order`."""
        return np.repeat(of_units, np.diff(self.starts))


def make_plan(tree: RequestTree, cost: Cost, outputs: np.ndarray, *, keep: float = 0.99) -> Plan:
    """Sorts, splits, sorts again and merges.

    Args:
      outputs: [requests], expected tokens of each answer.
      keep: share of the tokens saved by sharing that splitting must not give up.
    """
    totals, each = tree.nodes(cost, outputs), tree.requests(cost, outputs)
    tree = tree.arranged(-totals.density, -each.density)
    totals, each = tree.nodes(cost, outputs), tree.requests(cost, outputs)
    root = float(totals.density[0])
    budget = (1 - keep) * tree.shared_tokens
    intact, singles = split(tree, budget)
    unit = np.full(len(tree.order), -1, np.int64)  # by place in the tree's order
    for number, node in enumerate(intact):
        unit[tree.first[node] : tree.last[node]] = number
    place = np.empty_like(tree.order)
    place[tree.order] = np.arange(len(place))
    again = tree.depth[tree.attach]  # tokens that a request computes again once it stands alone
    count = int(np.count_nonzero(again[singles]))
    spent = int(again[singles].sum() + sum(tree.depth[tree.parent[node]] for node in intact))
    out = _outliers(each, unit[place], again, root, budget - spent, _MOST_SPLIT * len(unit) - count)
    alone = np.concatenate([singles, out])
    unit[place[alone]] = len(intact) + np.arange(len(alone))
    recomputed = spent + int(again[out].sum())
    return _merged(tree, cost, each, unit, intact, root, count + len(out), recomputed)


def split(tree: RequestTree, budget: float) -> tuple[list[int], np.ndarray]:
    """Algorithm 2: a node whose prefix times children exceeds the tokens that may be computed again stays whole; another
    is taken apart, and its children share its budget.

    Returns:
      the nodes that stay whole, and the requests that then stand alone.
    """
    children = np.bincount(tree.parent[1:], minlength=len(tree.first))
    children += np.bincount(tree.attach, minlength=len(tree.first))
    budgets = np.zeros(len(tree.first))
    budgets[0] = budget
    whole, opened = [], np.zeros(len(tree.first), bool)
    node, ends = 0, tree.ends
    while node < len(tree.first):
        if node:
            above = tree.parent[node]
            budgets[node] = budgets[above] / children[above]
        if tree.depth[node] * children[node] > budgets[node]:
            whole.append(node)
            node = int(ends[node])
        else:
            opened[node] = True
            node += 1
    return whole, np.flatnonzero(opened[tree.attach])


def _outliers(each, unit, again, root, budget, most) -> np.ndarray:
    """Requests on the other side of the batch's density than most of their unit, those first that are worth most for
    what they have to compute again."""
    inside = np.flatnonzero(unit >= 0)
    if not len(inside) or not np.isfinite(root) or root <= 0:
        return np.zeros(0, np.int64)
    excess = each.memory[inside] - each.compute[inside] / root
    of_unit = unit[inside]
    heavy = np.bincount(of_unit, excess > 0) > np.bincount(of_unit) / 2
    excess = np.where(heavy[of_unit], -excess, excess)
    worth = excess / np.maximum(again[inside], 1)
    best = inside[np.argsort(-worth, kind="stable")][: np.count_nonzero(worth > 0)][: max(int(most), 0)]
    return best[np.cumsum(again[best]) <= budget]


def _merged(tree, cost, each, unit, intact, root, splits, recomputed) -> Plan:
    """Units in descending density, small neighbours as one."""
    units = int(unit.max(initial=-1)) + 1
    compute = np.bincount(unit, each.compute[tree.order], units)
    memory = np.bincount(unit, each.memory[tree.order], units)
    shared = np.cumsum(np.append(0, tree.own))
    for number, node in enumerate(intact):
        compute[number] += cost.compute(shared[tree.ends[node]] - shared[node])
    rank = np.argsort(-_ratio(compute, memory), kind="stable")
    turn = np.empty(units, np.int64)
    turn[rank] = np.arange(units)
    line = np.argsort(turn[unit], kind="stable")
    starts = np.searchsorted(turn[unit][line], np.arange(units + 1))
    work = (compute + memory)[rank]
    part = (np.cumsum(work) - work / 2) / max(work.sum(), 1e-300)
    begins = np.flatnonzero(np.diff(np.floor(part / _FINEST), prepend=-1)) if units else np.zeros(0, np.int64)
    if units:
        compute, memory = np.add.reduceat(compute[rank], begins), np.add.reduceat(memory[rank], begins)
    return Plan(
        order=tree.order[line],
        starts=np.append(starts[begins], len(line)).astype(np.int64),
        density=_ratio(compute, memory),
        root_density=root,
        split=splits,
        recomputed=recomputed,
        tree=tree,
    )


def _ratio(compute: np.ndarray, memory: np.ndarray) -> np.ndarray:
    return np.divide(compute, memory, out=np.full(len(memory), np.inf), where=memory > 0)
