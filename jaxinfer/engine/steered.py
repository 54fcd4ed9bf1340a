"""Two queues from the two ends of a batch, and a scanner that says who starts and how much prompt a step takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxinfer.engine.sequence import Sequence
from jaxinfer.schedule.scanner import LEFT, RIGHT


class Steered:
    """An `Admission` whose decisions are a scanner's. Requests have numbers there; several sequences may be choices of one.

    Args:
      scanner: see `schedule.scanner`; it may be exchanged.
      numbers: that requests may have.
    """

    def __init__(self, scanner: Any, numbers: int):
        self._scanner = scanner
        self._index: dict[str, int] = {}
        self._running: dict[int, int] = {}  # choices of a request that run; a beam search counts as one
        self._open: dict[int, int] = {}  # and that are not finished
        self._answer: dict[int, int] = {}  # tokens of those that are
        self._again: deque[Sequence] = deque()
        self._queues: tuple[deque[Sequence], deque[Sequence]] = (deque(), deque())
        self._side = np.full(numbers, LEFT, np.int8)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Sequence]:
        for waiting in (self._again, *self._queues):
            yield from waiting

    def add(self, sequence: Sequence) -> None:
        index = self._index[sequence.request.id]
        self._open[index] = self._open.get(index, 0) + 1
        self._queues[self._side[index]].append(sequence)

    def next(self) -> Sequence | None:
        if self._again:
            return self._again.popleft()
        for side in (RIGHT, LEFT):
            sequence = self._head(side)
            if sequence is None:
                continue
            index = self._index[sequence.request.id]
            if self._scanner.wants(side, index):
                if self._queues[side]:
                    self._queues[side].popleft()
                else:
                    self._queues[1 - side].pop()
                self._side[index] = side
                return sequence
        return None

    def _head(self, side: int) -> Sequence | None:
        """The next of a side; once all have been handed over, a side without any goes on with the last of the other."""
        if self._queues[side]:
            return self._queues[side][0]
        other = self._queues[1 - side]
        return other[-1] if other and self._scanner.peek(side) < 0 else None

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        self._again.extendleft(reversed(list(sequences)))

    def preempted(self, sequence: Sequence) -> None:
        self._stopped(sequence)
        self._again.appendleft(sequence)

    def started(self, sequence: Sequence) -> None:
        index = self._index[sequence.request.id]
        self._running[index] = self._running.get(index, 0) + 1
        if self._running[index] == 1:
            self._scanner.start(index, int(self._side[index]))

    def finished(self, sequence: Sequence) -> None:
        index = self._index[sequence.request.id]
        self._answer[index] = self._answer.get(index, 0) + sequence.generated * len(sequence.siblings)
        self._open[index] -= 1
        self._stopped(sequence)
        if not self._open[index]:
            del self._index[sequence.request.id], self._open[index], self._running[index], self._answer[index]

    def _stopped(self, sequence: Sequence) -> None:
        """A request runs until the last of its running choices stops; it is finished when all choices are."""
        index = self._index[sequence.request.id]
        self._running[index] -= 1
        if not self._open[index]:
            self._ended(index, self._answer[index])
        elif not self._running[index]:
            if sequence.finished:
                self._scanner.stop(index)
            else:
                self._scanner.preempt(index)

    def _ended(self, index: int, generated: int) -> None:
        """All choices of a request are finished, with so many tokens."""
        self._scanner.finish(index, generated)

    def prefill_budget(self, decoding: int, keys: int, room: int) -> int:
        return min(int(self._scanner.prefill(decoding, keys)), room)

    def victim(self, running: list[Sequence]) -> Sequence:
        return running[-1]

    def booked(self, steps: int, tokens: int, keys: int) -> None:
        self._scanner.step(tokens, keys)
        self._scanner.clock += steps - 1

    def clear(self) -> None:
        for waiting in (self._again, *self._queues):
            waiting.clear()
