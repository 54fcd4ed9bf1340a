"""Who is sent what: every worker its own units, idle ones subtrees of the largest remainder, lost rows again."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from jaxinfer.scaleout.units import Units

_SUSPECT = 2  # workers that died while they had a row, before it is sent by itself
_NONE = np.zeros(0, np.int64)


class Dispatcher:
    """Keeps at the driver all that no worker has begun, so that it can still go to another one.

    Args:
      workers: how many; the units are theirs in equal, consecutive numbers.

    Attributes:
      sides: lines that each worker is sent from, see `Units`.
    """

    def __init__(self, units: Units, workers: int):
        self.sides = units.sides
        self._lines = [_Line(units, workers, side) for side in range(units.sides)]
        self._again: list[deque[int]] = [deque() for _ in range(units.sides)]
        self._suspects: list[deque[int]] = [deque() for _ in range(units.sides)]
        self._deaths: Counter[int] = Counter()

    @property
    def left(self) -> int:
        """Rows that are still to be sent."""
        return sum(line.left for line in self._lines) + sum(map(len, self._again + self._suspects))

    @property
    def stolen(self) -> int:
        """Rows that went to another worker than was planned."""
        return sum(line.stolen for line in self._lines)

    def take(
        self, worker: int, most: Sequence[int], waiting: Sequence[int], *, idle: bool
    ) -> list[np.ndarray]:
        """int64 [at most `most`] of each side: the next requests for a worker, none if there are none for it now.

        Args:
          waiting: of each side, requests that it has not begun; it takes from others only where there are none.
          idle: it has nothing else; only such a worker is given a row that others died of, and that alone.
        """
        taken = []
        for line, again, wanted, waits in zip(self._lines, self._again, most, waiting, strict=True):
            wanted = max(wanted, 0)  # more may wait than is meant to, such as those that lost their places
            lost = [again.popleft() for _ in range(min(len(again), wanted))]
            rows = line.take(worker, wanted - len(lost), steals=not waits and not lost)
            taken.append(np.concatenate([np.array(lost, np.int64), rows]))
        if idle and not any(map(len, taken)):
            for side, suspects in enumerate(self._suspects):
                if suspects and most[side]:
                    taken[side] = np.array([suspects.popleft()], np.int64)
                    break
        return taken

    def coming(self, worker: int) -> np.ndarray:
        """float64 [sides, 3]: the work that is kept for a worker, see `Units.work`."""
        return np.array([line.coming(worker) for line in self._lines])

    def give_back(self, rows: Sequence[Sequence[int]]) -> int | None:
        """What a dead worker had of each side and did not answer is to be sent again, before all else.

        Returns:
          the row that it died of: one that it had alone, and that other workers died with; that one is not sent again.
        """
        every = [row for side in rows for row in side]
        self._deaths.update(every)
        if len(every) == 1 and self._deaths[every[0]] > _SUSPECT:
            return every[0]
        for side, lost in enumerate(rows):
            for row in lost:
                (self._suspects if self._deaths[row] >= _SUSPECT else self._again)[side].append(row)
        return None


class _Line:
    """Of each worker, the stretches of one side that it is to be sent."""

    def __init__(self, units: Units, workers: int, side: int):
        self._units = units
        self._queues: list[deque[tuple[int, int]]] = [deque() for _ in range(workers)]
        self._seconds = np.zeros(workers)  # of each queue
        bounds = list(zip(units.starts[:-1].tolist(), units.starts[1:].tolist()))[side :: units.sides]
        for number, (start, stop) in enumerate(bounds):
            if stop > start:
                self._put(number * workers // len(bounds), start, stop)
        self.stolen = 0

    @property
    def left(self) -> int:
        return sum(stop - start for queue in self._queues for start, stop in queue)

    def coming(self, worker: int) -> np.ndarray:
        work = self._units.work
        return sum((work[stop] - work[start] for start, stop in self._queues[worker]), np.zeros(3))

    def take(self, worker: int, wanted: int, *, steals: bool) -> np.ndarray:
        pieces = [_NONE]
        if steals and wanted and not self._queues[worker]:
            self._steal(worker)
        while wanted and self._queues[worker]:
            start, stop = self._queues[worker].popleft()
            middle = min(start + wanted, stop)
            self._seconds[worker] -= self._length(start, stop)
            if middle < stop:
                self._queues[worker].appendleft((middle, stop))
                self._seconds[worker] += self._length(middle, stop)
            pieces.append(self._units.line[start:middle])
            wanted -= middle - start
        return np.concatenate(pieces)

    def _put(self, worker: int, start: int, stop: int) -> None:
        self._queues[worker].append((start, stop))
        self._seconds[worker] += self._length(start, stop)

    def _length(self, start: int, stop: int) -> float:
        return float(self._units.seconds[stop] - self._units.seconds[start])

    def _steal(self, thief: int) -> bool:
        """Half of what the worker with the most work has left, whole subtrees from the end."""
        victim = int(np.argmax(self._seconds))
        queue = self._queues[victim]
        if not queue:  # rounding may leave a little time where no work is left
            victim = next((number for number, queue in enumerate(self._queues) if queue), -1)
            if victim < 0:
                return False
            queue = self._queues[victim]
        wanted, taken = max(self._seconds[victim] / 2, 1e-300), deque[tuple[int, int]]()
        while queue and wanted > 0:
            start, stop = queue.pop()
            length = self._length(start, stop)
            if length > wanted:
                cut = (
                    self._boundary(start, stop, wanted) if stop - start > 1 else start if not taken else stop
                )
                if cut > start:
                    queue.append((start, cut))
                start = cut
                wanted = 0.0
            if stop > start:
                taken.appendleft((start, stop))
            wanted -= length
        self._seconds[victim] = sum(self._length(*piece) for piece in queue)
        for piece in taken:
            self._put(thief, *piece)
        self.stolen += sum(stop - start for start, stop in taken)
        return bool(taken)

    def _boundary(self, start: int, stop: int, wanted: float) -> int:
        """Where to cut about `wanted` seconds off the end: within half as much of it, where least is shared."""
        seconds = self._units.seconds
        at = seconds[stop] - wanted
        low, high = np.searchsorted(seconds, [at - wanted / 2, at + wanted / 2])
        low, high = max(int(low), start + 1), min(int(high), stop - 1)
        places = np.arange(min(low, high), high + 1)
        missed = np.abs(seconds[places] - at)
        return int(places[np.lexsort((missed, self._units.common[places]))[0]])
