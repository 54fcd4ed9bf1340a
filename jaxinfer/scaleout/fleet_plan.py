"""What a fleet knows of a batch: who is sent what, and what its workers are told of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from jaxinfer.core import Request
from jaxinfer.scaleout.dispatch import Dispatcher
from jaxinfer.scaleout.inbox import Sent
from jaxinfer.scaleout.units import Units
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.fed import ANSWERS, READS, TOKENS
from jaxinfer.schedule.lengths import expect
from jaxinfer.schedule.plan import make_plan
from jaxinfer.schedule.tree import RequestTree
from jaxinfer.schedule.workload import Sharing, Workload

_PRIOR_ANSWERS = 8  # that what is expected of the others counts as


def ahead(slots: int) -> tuple[int, int]:
    """Requests of each side that wait at a worker, for it not to run dry between two turns. Memory-heavy ones begin seldom, and those
    that wait at the driver can still go elsewhere."""
    return max(slots // 2, 1), max(slots // 32, 1)


class FleetPlan:
    """The whole batch as units of equal work, the same number for each worker. Hands requests over in the order in which workers ask
    for them; see `batch.survey.BlendEngine`.

    Args:
      units: of each worker.

    Attributes:
      count: requests to answer.
    """

    def __init__(
        self, workload: Workload, tree: RequestTree, sharing: Sharing, cost: Cost, workers: int, units: int
    ):
        known = workload.known
        seen = np.flatnonzero(known >= 0)
        lengths = expect(tree, workload.least, workload.answer_limits, seen, known[seen]).length
        open_ = known < 0
        served = open_ & (workload.prompt_tokens > 0)  # refused rows have no tokens
        plan = make_plan(tree, cost, lengths).only(served)
        cut = Units.cut(plan, cost, lengths, units * workers, sharing, turns=units)
        self.dispatcher = Dispatcher(cut, workers)
        self.count = int(np.count_nonzero(served))
        self.side = cut.side_of(len(served))
        self._alone, self._lengths = tree.alone, lengths
        self._guessed = workload.least < workload.answer_limits
        self._answers = np.full(
            (2, 2), _PRIOR_ANSWERS * max(float(lengths[served].mean()), 1.0) if served.any() else 1.0
        )
        self._refused = np.flatnonzero(open_ & ~served)
        self._next = -1

    def indices(self) -> Iterator[int]:
        """First the rows that are not served; then what `fetch` was last asked for, as long as it asks."""
        yield from self._refused.tolist()
        while self.count:
            yield self._next

    def expects(self, request_id: str, index: int) -> None:
        """Which request comes next; `fetch` knows it already."""

    def fetch(self, source: Iterator[Request], index: int) -> Sent:
        self._next = index
        side = int(self.side[index])
        share = self._shares[side] if self._guessed[index] else 1.0
        length = max(float(self._lengths[index]) * share, 1.0)
        return Sent(next(source), side, int(self._alone[index]), length)

    def learn(self, index: int, generated: int) -> None:
        """How long an answer was."""
        if self._guessed[index]:
            self._answers[:, self.side[index]] += generated, self._lengths[index]

    def by_side(self, indices: Iterable[int]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in range(self.dispatcher.sides)]
        for index in indices:
            rows[self.side[index]].append(index)
        return rows

    @property
    def _shares(self) -> np.ndarray:
        """float64 [2]: how long the answers of each side are, over what was expected of them."""
        return self._answers[0] / self._answers[1]

    def coming(self, worker: int) -> np.ndarray:
        """float64 [2, 3] by side: the work that is kept for a worker, by what is known of answers now."""
        work = np.zeros((2, 3))
        work[: self.dispatcher.sides] = self.dispatcher.coming(worker)
        shares = self._shares
        work[:, TOKENS] -= (1 - shares) * work[:, ANSWERS]
        work[:, ANSWERS] *= shares
        work[:, READS] *= shares  # of long answers a little more than what is true
        return work
