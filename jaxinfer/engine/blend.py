"""BlendServe in the engine: the plan of a whole batch decides who starts and how much prompt a step takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxinfer.engine.sequence import Sequence
from jaxinfer.engine.steered import Steered
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.lengths import expect, sample
from jaxinfer.schedule.plan import make_plan
from jaxinfer.schedule.scanner import LEFT, RIGHT
from jaxinfer.schedule.scanners import blend_scanner
from jaxinfer.schedule.tree import RequestTree
from jaxinfer.schedule.workload import Workload

_SAMPLE = 0.01  # of the requests of unknown length run first
_FEWEST_SAMPLED = 8
_AHEAD = 32  # requests of each side that wait in the engine


class Blend(Steered):
    """An `Admission` from a plan. `indices` says in which order to hand requests over; `expects` names each before it comes.

    A sample of the requests runs first and tells how long answers are; the rest is planned by it, and again each time that four
    times as many answers are known. Answers of an earlier run are known from the start; enough of them stand for the sample.

    Args:
      workload, tree: of all requests.
      capacity: tokens of the KV pool.
      slots: most sequences that run at once.
      max_tokens: of a step.
      quantum: steps are filled up to a multiple of so many tokens.
    """

    def __init__(
        self,
        workload: Workload,
        tree: RequestTree,
        cost: Cost,
        *,
        capacity: int,
        slots: int,
        max_tokens: int,
        quantum: int,
        seed: int = 0,
    ):
        count = len(workload.answer_limits)
        super().__init__(None, count)
        self._workload, self._tree, self._cost = workload, tree, cost
        self._shape: dict[str, Any] = {
            "capacity": capacity,
            "slots": slots,
            "max_tokens": max_tokens,
            "quantum": quantum,
        }
        self._generated = workload.known.copy()
        self._taken = self._generated >= 0  # handed over, and not planned anew
        self._known = int(np.count_nonzero(self._taken))
        self._held: dict[int, list[Sequence]] = {}  # handed over, but to be planned anew
        open_ = (workload.least < workload.answer_limits) & ~self._taken
        first = sample(open_, _SAMPLE, seed)
        self._first = np.intersect1d(first, np.flatnonzero(tree.prompt > 0))
        if len(self._first) < _FEWEST_SAMPLED or len(self._first) <= self._known:
            self._first = self._first[:0]
        self._taken[self._first] = True
        self._next_plan = self._known + (len(self._first) or max(count // 64, 64, 3 * self._known))
        self._plan()

    def _plan(self) -> None:
        """Order what has not started by what is known of lengths."""
        seen = np.flatnonzero(self._generated >= 0)
        limits, least = self._workload.answer_limits, self._workload.least
        expected = expect(self._tree, least, limits, seen, self._generated[seen])
        plan = make_plan(self._tree, self._cost, expected.length).only(~self._taken)
        before = self._scanner
        self._scanner = blend_scanner(plan, expected, self._cost, **self._shape)
        if before is not None:
            self._scanner.go_on(before, np.flatnonzero(self._taken & (self._generated < 0)))

    def indices(self) -> Iterator[int]:
        """Every request once, in the order in which it is to be handed over; steered by what has happened meanwhile."""
        yield from self._first.tolist()
        while True:
            if self._known >= self._next_plan:
                self._next_plan = 4 * self._known
                self._take_back()
                self._plan()
            if self._scanner.peek(LEFT) < 0:
                return
            side = RIGHT if len(self._queues[RIGHT]) < len(self._queues[LEFT]) else LEFT
            index = int(self._scanner.take(side))
            self._taken[index], self._side[index] = True, side
            if index in self._held:
                self._queues[side].extend(self._held.pop(index))
            else:
                yield index

    def _take_back(self) -> None:
        """What waits in the queues is planned with the rest, but choices of requests that have started."""
        begun = self._running.keys() | {self._index[sequence.request.id] for sequence in self._again}
        for queue in self._queues:
            waiting = list(queue)
            queue.clear()
            for sequence in waiting:
                index = self._index[sequence.request.id]
                if index in begun:
                    queue.append(sequence)
                else:
                    self._taken[index] = False
                    self._held.setdefault(index, []).append(sequence)

    @property
    def expected_tokens(self) -> float:
        """Tokens that are still to go through the model, by what is known now."""
        return float(self._scanner.left_tokens)

    def expects(self, request_id: str, index: int) -> None:
        self._index[request_id] = index

    def hungry(self, window: int) -> bool:
        lengths = [len(queue) for queue in self._queues]
        return min(lengths) < _AHEAD and len(self._again) + sum(lengths) < window

    def __iter__(self) -> Iterator[Sequence]:
        yield from super().__iter__()
        for waiting in self._held.values():
            yield from waiting

    def _ended(self, index: int, generated: int) -> None:
        self._generated[index] = generated
        self._known += 1
        super()._ended(index, generated)

    def clear(self) -> None:
        super().clear()
        self._held.clear()
