"""Who is sent what: every worker its own units, idle ones subtrees of the largest remainder, lost rows again."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

from jaxinfer.scaleout.units import Units

_SUSPECT = 2  # workers that died while they had a row, before it is sent by itself
_NONE = np.zeros(0, np.int64)


class Dispatcher:
    """Keeps at the driver all that no worker has begun, so that it can still go to another one.

    Args:
      workers: how many; the units are theirs in equal, consecutive numbers.
    """

    def __init__(self, units: Units, workers: int):
        self._units = units
        bounds = list(zip(units.starts[:-1].tolist(), units.starts[1:].tolist()))
        self._queues: list[deque[tuple[int, int]]] = [deque() for _ in range(workers)]
        self._seconds = np.zeros(workers)  # of each queue
        for number, (start, stop) in enumerate(bounds):
            if stop > start:
                self._put(number * workers // len(bounds), start, stop)
        self._again: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._deaths: Counter[int] = Counter()
        self.stolen = 0

    @property
    def left(self) -> int:
        """Rows that are still to be sent."""
        waiting = sum(stop - start for queue in self._queues for start, stop in queue)
        return waiting + len(self._again) + len(self._suspects)

    def take(self, worker: int, most: int, *, idle: bool) -> np.ndarray:
        """int64 [at most `most`]: the next requests for a worker, none if there are none for it now.

        Args:
          idle: it has nothing else; only such a worker is given a row that others died of, and that alone.
        """
        pieces, wanted = [_NONE], most
        while wanted and self._again:
            pieces.append(np.array([self._again.popleft()], np.int64))
            wanted -= 1
        while wanted and (self._queues[worker] or self._steal(worker)):
            start, stop = self._queues[worker].popleft()
            middle = min(start + wanted, stop)
            self._seconds[worker] -= self._length(start, stop)
            if middle < stop:
                self._queues[worker].appendleft((middle, stop))
                self._seconds[worker] += self._length(middle, stop)
            pieces.append(self._units.line[start:middle])
            wanted -= middle - start
        if wanted == most and most and idle and self._suspects:
            pieces.append(np.array([self._suspects.popleft()], np.int64))
        return np.concatenate(pieces)

    def give_back(self, rows: list[int]) -> int | None:
        """What a dead worker had and did not answer is to be sent again, before all else.

        Returns:
          the row that it died of: one that it had alone, and that other workers died with; that one is not sent again.
        """
        self._deaths.update(rows)
        if len(rows) == 1 and self._deaths[rows[0]] > _SUSPECT:
            return rows[0]
        for row in rows:
            (self._suspects if self._deaths[row] >= _SUSPECT else self._again).append(row)
        return None

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
