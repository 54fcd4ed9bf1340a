"""Many engines that look like one to a batch run: it plans for them, feeds them, and outlives them."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxinfer.config import Settings
from jaxinfer.core import Completion, Request
from jaxinfer.errors import ENGINE_FAILURE, ConfigError, EngineError, JaxInferError, RequestError
from jaxinfer.scaleout.cluster import cause_of, join, reason_of, resources
from jaxinfer.scaleout.fleet_plan import FleetPlan, ahead
from jaxinfer.scaleout.rank import Hello, LLMRank, Rank, package_version
from jaxinfer.scaleout.seat import Seat
from jaxinfer.scaleout.worker import Started, Turn, Worker
from jaxinfer.schedule.tree import RequestTree
from jaxinfer.schedule.workload import Sharing, Workload

logger = logging.getLogger("jaxinfer")

_FRUITLESS = 3  # starts in a row without a finished row, after which a worker is given up
_WAIT_SECONDS = 1.0
_MOST_SHOWN = 8  # workers whose rates are shown one by one


@dataclass(frozen=True)
class Front:
    """What a driver knows of the model without loading it."""

    tokenizer: Any
    model_name: str
    model_fingerprint: str


class Fleet:
    """Workers on a Ray cluster, for one batch. It looks like `jaxinfer.LLM` to a batch run.

    Args:
      address: of the cluster, see `cluster.join`.
      load: makes a worker's engine, in the worker.

    Raises:
      ConfigError: no such cluster, no room on it, or workers with another jaxinfer or another checkpoint.
      JaxInferError: what a worker raised while it loaded the model.
      EngineError: a worker ended at every start.
    """

    def __init__(
        self, front: Front, settings: Settings, address: str, load: Callable[[Settings], Rank] = LLMRank
    ):
        self.tokenizer = front.tokenizer
        self.model_name, self.model_fingerprint = front.model_name, front.model_fingerprint
        self._settings, self._load = settings, load
        self._ray = join(address)
        count, self._options = resources(self._ray, settings)
        self._seats = [Seat(number) for number in range(count)]
        self._again = 0
        self._limits: Any = None
        self._cost: Any = None
        hellos: list[Hello] = []
        try:
            for seat in self._seats:
                self._start(seat)
            while len(hellos) < count:
                for seat in self._ready():
                    reply = self._reply(seat)
                    if isinstance(reply, Started):
                        hellos.append(self._welcome(seat, reply))
        except BaseException:
            self.close()
            raise
        least = min(hellos, key=lambda hello: hello.pool_tokens)
        self._limits, self._cost = least.limits, least.cost

    def token_limit(self, request: Request) -> int:
        """As the engine with the smallest pool says."""
        return self._limits.token_limit(request)

    def blend(self, workload: Workload, sharing: Sharing) -> FleetPlan:
        tree = RequestTree.shared(workload, sharing, self._settings.cache.page_size)
        return FleetPlan(workload, tree, sharing, self._cost, len(self._seats), self._settings.scaleout.units)

    def stream(self, requests: Iterable[Request], plan: Any = None) -> Iterator[Completion]:
        """Completions as they finish. A worker that ends is started again, and what it had not answered is sent again.

        Raises:
          EngineError: a worker ended at each of several starts without finishing a row.
        """
        assert isinstance(plan, FleetPlan), "a fleet serves what it has planned"
        source = iter(requests)
        left = plan.count
        try:
            if not left:
                next(source, None)  # rows that are not served are written while the first is looked for
            for seat in self._seats:
                if seat.slots:
                    self._send(seat, source, plan)
            while left:
                for seat in self._ready():
                    for completion in self._take(seat, plan):
                        left -= 1
                        yield completion
                    if seat.slots and left:
                        self._send(seat, source, plan)
        finally:
            self.close()

    def _send(self, seat: Seat, source: Iterator[Request], plan: FleetPlan) -> None:
        dispatcher, idle = plan.dispatcher, not seat.in_flight
        waiting = seat.waiting[: dispatcher.sides]
        if dispatcher.sides == 1:
            room = [seat.slots + ahead(seat.slots)[0] - len(seat.in_flight)]
        else:
            room = [most - here for most, here in zip(ahead(seat.slots), waiting)]
        sent = []
        for rows in dispatcher.take(seat.number, room, waiting, idle=idle):
            for index in rows.tolist():
                sent.append(plan.fetch(source, index))
                seat.in_flight[sent[-1].request.id] = index
        seat.call(seat.actor.turn.remote(sent, plan.coming(seat.number)))

    def _take(self, seat: Seat, plan: FleetPlan) -> list[Completion]:
        """What a worker's reply brings: completions, or the rows that it lost with its end."""
        sent = dict(seat.in_flight)
        reply = self._reply(seat)
        if isinstance(reply, Turn):
            done = seat.take(reply)
            for completion in (each for each in done if each.error is None):
                plan.learn(sent[completion.request_id], completion.usage.completion_tokens)
            return done
        if isinstance(reply, Started):
            self._welcome(seat, reply)
            return []
        self._again += len(sent)
        if plan.dispatcher.give_back(plan.by_side(sent.values())) is None:
            return []
        error = RequestError(
            ENGINE_FAILURE, "every worker that was sent this request ended before answering it"
        )
        return [Completion(request_id=next(iter(sent)), error=error)]

    def _reply(self, seat: Seat) -> Started | Turn | None:
        """None if the worker has ended instead; it is then started again."""
        if time.monotonic() - seat.since > self._patience(seat) and not self._answered(seat):
            self._end(seat, f"no answer for {self._patience(seat):.0f} s")
            return None
        try:
            reply = self._ray.get(seat.reply)
            seat.reply = None
            return reply
        except self._ray.exceptions.RayError as error:
            cause = cause_of(error)
            if not seat.slots and isinstance(cause, JaxInferError):
                raise cause from None  # it would come at every start
            self._end(seat, reason_of(error))
            return None

    def _end(self, seat: Seat, reason: str) -> None:
        name = seat.name
        if seat.actor is not None:
            self._ray.kill(seat.actor)
        seat.ended()
        logger.warning("%s ended: %s", name, reason)
        if seat.fruitless >= _FRUITLESS:
            raise EngineError(f"{name} ended at {seat.fruitless} starts without finishing a row: {reason}")
        self._start(seat)

    def _start(self, seat: Seat) -> None:
        seat.actor = self._ray.remote(Worker).options(max_restarts=0, **self._options).remote()
        seat.call(seat.actor.start.remote(self._load, self._settings))

    def _welcome(self, seat: Seat, started: Started) -> Hello:
        """Raises ConfigError for a worker that would answer differently."""
        hello, name = started.hello, f"worker {seat.number} ({started.place})"
        if hello.package != package_version():
            raise ConfigError(
                f"{name} has jaxinfer {hello.package}, this driver {package_version()}; install the same everywhere"
            )
        if hello.model != self.model_fingerprint:
            raise ConfigError(
                f"{name} has another checkpoint under this path: {self.model_name} {hello.model[:12]}, "
                f"here {self.model_fingerprint[:12]}; copy the same folder to every machine"
            )
        seat.started(started.place, hello.slots)
        return hello

    def _ready(self) -> list[Seat]:
        """Seats whose call has ended, or has lasted too long."""
        waiting = {seat.reply: seat for seat in self._seats if seat.reply is not None}
        self._ray.wait(list(waiting), num_returns=1, timeout=_WAIT_SECONDS)
        done, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        now = time.monotonic()
        late = [seat for seat in waiting.values() if now - seat.since > self._patience(seat)]
        return list({seat.number: seat for seat in [*(waiting[reply] for reply in done), *late]}.values())

    def _answered(self, seat: Seat) -> bool:
        return bool(self._ray.wait([seat.reply], timeout=0)[0])

    def _patience(self, seat: Seat) -> float:
        scaleout = self._settings.scaleout
        return scaleout.silence_seconds if seat.slots else scaleout.start_seconds

    def close(self) -> None:
        """End all workers. The counts stay."""
        for seat in self._seats:
            if seat.actor is not None:
                with contextlib.suppress(Exception):  # the cluster may be gone
                    self._ray.kill(seat.actor)
                seat.actor = seat.reply = None

    def metrics(self) -> dict[str, float]:
        """Counters and gauges of all engines together, and what each worker does."""
        total: dict[str, float] = {}
        for seat in self._seats:
            for name, value in seat.metrics().items():
                total[name] = total.get(name, 0) + value
        shown: dict[str, float] = dict(total) | {
            "workers": len(self._seats),
            "worker_failures": sum(seat.failures for seat in self._seats),
            "rows_sent_again": self._again,
        }
        if len(self._seats) <= _MOST_SHOWN:
            for seat in self._seats:
                shown |= {
                    f"worker_{seat.number}_rows": seat.rows,
                    f"worker_{seat.number}_tokens_per_s": seat.tokens_per_s,
                    f"worker_{seat.number}_failures": seat.failures,
                }
        return shown

    def state(self) -> str:
        """All workers in a few words, for the progress line."""
        rates = [seat.tokens_per_s for seat in self._seats]
        loading = sum(not seat.slots for seat in self._seats)
        failures = sum(seat.failures for seat in self._seats)
        if len(rates) <= _MOST_SHOWN:
            each = " + ".join(f"{rate:,.0f}" for rate in rates)
        else:
            each = f"{min(rates):,.0f} to {max(rates):,.0f}, mean {statistics.fmean(rates):,.0f}"
        notes = [f"{loading} loading"] * bool(loading) + [f"{failures} failed"] * bool(failures)
        return f"{len(rates)} workers ({each} tokens/s{''.join(f', {note}' for note in notes)})"
