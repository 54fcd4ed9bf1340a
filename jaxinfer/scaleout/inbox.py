"""What a worker was sent and has not begun."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxinfer.core import Request
from jaxinfer.schedule.scanner import LEFT, RIGHT

BOTH = (LEFT, RIGHT)


@dataclass(frozen=True)
class Sent:
    """A request with what its driver knows of it.

    Attributes:
      side: of the batch, compute-heavy (LEFT, also where sides make no difference) or memory-heavy (RIGHT).
      alone: tokens of its prompt that no other request has.
      length: expected tokens of its answer, all choices together.
    """

    request: Request
    side: int = LEFT
    alone: int = 0
    length: float = 0.0


class Inbox:
    """Requests that one thread puts in and another takes out; an iterator over them that ends once it is closed and empty.

    Attributes:
      coming: float64 [2, 3], the work that the driver still has for this worker, see `Units.work`.
    """

    def __init__(self) -> None:
        self.coming = np.zeros((2, 3))
        self._sides: tuple[deque[Sent], deque[Sent]] = (deque(), deque())
        self._changed = threading.Condition()
        self._closed = False

    def put(self, sent: Iterable[Sent], coming: np.ndarray | None = None) -> None:
        with self._changed:
            for each in sent:
                self._sides[each.side].append(each)
            if coming is not None:
                self.coming = coming
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def waiting(self) -> tuple[int, int]:
        """Requests of each side."""
        return len(self._sides[LEFT]), len(self._sides[RIGHT])

    def ready(self, wait: float = 0.0, sides: Iterable[int] = BOTH) -> bool:
        """Whether `take` would return at once; waits for at most so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or any(self._sides[s] for s in sides), wait)

    def take(self, sides: Iterable[int] = BOTH) -> Sent | None:
        """The next of the side, among these, of which most wait; once it is closed of either, and None when it is empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(self._sides[s] for s in sides))
            fullest = max((self._sides[side] for side in sides), key=len) or max(self._sides, key=len)
            return fullest.popleft() if fullest else None

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        if (sent := self.take()) is None:
            raise StopIteration
        return sent.request
