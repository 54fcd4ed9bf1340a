"""Many simulated workers around the driver's own code: units, dispatcher, rows lost and sent again."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.simulated import Setting
from bench.simulated_worker import SimulatedWorker
from jaxinfer.scaleout.dispatch import Dispatcher
from jaxinfer.scaleout.fleet_plan import ahead
from jaxinfer.scaleout.units import Units
from jaxinfer.schedule.fed import FedScanner
from jaxinfer.schedule.pool import SimulatedPool
from jaxinfer.schedule.tree import RequestTree

SLOTS = 256
_QUANTUM = 128
_TURN = 64  # rows that a worker finishes before it asks for more; a real one asks more often
_LAST_TURN = 8  # the same where nothing is kept for it any longer


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Attributes:
    between_failures: mean seconds between two ends of a worker.
    start_seconds: until another process has its place.
    slow: share of the workers that are half as fast for good; the speeds of the others differ by some percent.
    between_changes: mean seconds between two changes of a worker's speed; at one time in ten it is down to 0.3 to 1 of its own.
    """

    between_failures: float = math.inf
    start_seconds: float = 120.0
    slow: float = 0.0
    between_changes: float = math.inf


NONE = Trouble()


class SimulatedFleet:
    """Serves all rows of some units at once.

    Args:
      make: `schedule.simulate.compiled`, or a plain call.

    Attributes:
      ends: float64 [workers], when each finished its last row.
      capacity: seconds at speed 1 that the workers would have worked until the last row, had none of them failed or waited.
      lost_rows, lost_seconds: sent again, and the compute and memory time that had gone into them.
      accused: rows given up because three workers ended with them.
      turns, turn_seconds: calls of the dispatcher, and what they took of the driver's time.
    """

    def __init__(
        self,
        units: Units,
        tree: RequestTree,
        outputs: np.ndarray,
        setting: Setting,
        workers: int,
        trouble: Trouble,
        make: Callable[..., Any],
    ):
        self._trouble, self._draw = trouble, np.random.default_rng(workers)
        self.dispatcher = Dispatcher(units, workers)
        self._late = units.side_of(len(outputs))
        cost, alone, own = setting.cost, tree.alone, tree.own
        self._workers = []
        most = np.array(ahead(SLOTS))
        for _ in range(workers):
            pool = make(SimulatedPool, own, tree.parent, tree.attach, alone, setting.capacity)
            limits = setting.capacity, SLOTS, setting.max_tokens, _QUANTUM
            places = SLOTS + int(most.sum())
            scanner = make(FedScanner, places, cost.token_seconds, cost.step_seconds, *limits)
            rates = cost.token_seconds, cost.key_seconds, cost.step_seconds
            joint = cost.joint.linear, cost.joint.square
            given = scanner, pool, tree.prompt, outputs, *rates, *joint, SLOTS, most
            self._workers.append(make(SimulatedWorker, *given))
        normal = trouble.slow > 0
        self._speed = self._draw.normal(1, 0.05, workers).clip(0.8, 1.2) if normal else np.ones(workers)
        self._speed[self._draw.random(workers) < trouble.slow] = 0.5
        for worker, speed in zip(self._workers, self._speed):
            worker.speed = float(speed)
        self._dies = self._draw.exponential(trouble.between_failures, workers)
        self._changes = self._draw.exponential(trouble.between_changes, workers)
        self._changed, self._starting = np.zeros(workers), np.zeros(workers, bool)
        self._turns = [(0.0, number) for number in range(workers)]
        self._idle: set[int] = set()
        self.ends, self.capacity = np.zeros(workers), 0.0
        self.finished = self.failures = self.lost_rows = self.accused = self.turns = 0
        self.lost_seconds = self.turn_seconds = 0.0

    def run(self) -> None:
        while self._turns:
            now, number = heapq.heappop(self._turns)
            self._turn(now, number)
        for number, worker in enumerate(self._workers):
            self.capacity += worker.speed * max(self.seconds - self._changed[number], 0.0)

    @property
    def seconds(self) -> float:
        return float(self.ends.max())

    @property
    def prefilled(self) -> int:
        return sum(worker.prefilled for worker in self._workers)

    def _turn(self, now: float, number: int) -> None:
        worker = self._workers[number]
        if self._starting[number]:
            self._starting[number] = False
            worker.seconds = now
            self._dies[number] = now + self._draw.exponential(self._trouble.between_failures)
        if done := len(worker.collect()):
            self.finished += done
            self.ends[number] = now
        if now >= self._dies[number] and worker.here:
            self._end(number)
            return
        if now >= self._changes[number]:
            self._change(now, number)
        start = time.perf_counter()
        waiting, room = worker.waits.tolist(), (worker.ahead - worker.waits).tolist()
        rows = self.dispatcher.take(number, room, waiting, idle=worker.here == 0)
        coming = self.dispatcher.coming(number)
        self.turn_seconds += time.perf_counter() - start
        self.turns += 1
        for side, some in enumerate(rows):
            worker.send(some, side)
        worker.scanner.outlook(coming)
        if not worker.here:
            self._idle.add(number)
            return
        wanted = _TURN if coming.any() else _LAST_TURN
        worker.advance(min(self._dies[number], self._changes[number]), wanted)
        heapq.heappush(self._turns, (worker.seconds, number))

    def _end(self, number: int) -> None:
        """A worker is gone; what it had goes to whoever asks next."""
        worker = self._workers[number]
        now = worker.seconds
        lost, seconds = worker.lose()
        rows = [lost[self._late[lost] == side].tolist() for side in range(self.dispatcher.sides)]
        self.failures, self.lost_rows = self.failures + 1, self.lost_rows + len(lost)
        self.lost_seconds += seconds
        if self.dispatcher.give_back(rows) is not None:
            self.accused += 1
        self._starting[number] = True
        heapq.heappush(self._turns, (now + self._trouble.start_seconds, number))
        for other in self._idle:
            self._workers[other].seconds = now
            self._dies[other] = now + self._draw.exponential(self._trouble.between_failures)
            heapq.heappush(self._turns, (now, other))
        self._idle.clear()

    def _change(self, now: float, number: int) -> None:
        worker = self._workers[number]
        self.capacity += worker.speed * (now - self._changed[number])
        slowed = self._draw.random() < 0.1
        worker.speed = float(self._speed[number] * (self._draw.uniform(0.3, 1) if slowed else 1))
        self._changed[number] = now
        self._changes[number] = now + self._draw.exponential(self._trouble.between_changes)
