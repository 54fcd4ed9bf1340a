"""The policy "blend" on a machine that computes and reads one after the other: each kind of work by itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxinfer.engine.admission import Fifo
from jaxinfer.schedule.plan import Plan
from jaxinfer.schedule.workload import Sharing


class Apart(Fifo):
    """Mixing kinds of work in a step saves nothing there; what counts is that prefixes are found again, that all places are
    taken, and that decode steps go several to a call, which they do only while no prompt is computed. So requests come in
    depth-first order, but memory-heavy ones that share next to nothing come last.

    Args:
      lengths: float64 [requests], expected tokens of each answer.
    """

    def __init__(self, plan: Plan, sharing: Sharing, lengths: np.ndarray):
        super().__init__()
        line = np.argsort(sharing.rank, kind="stable")
        line = line[np.isin(line, plan.order)]
        late = np.isin(line, plan.loners(lengths))
        self._order = np.concatenate([line[~late], line[late]])

    def indices(self) -> Iterator[int]:
        """Every request once, in the order in which it is to be handed over."""
        yield from self._order.tolist()

    def expects(self, request_id: str, index: int) -> None:
        """Which request comes next; the order is all that this plan needs."""
