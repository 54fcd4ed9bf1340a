"""How a worker's engine takes requests that come bit by bit, without holding up those that run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.core import Request
from jaxinfer.engine.admission import Fifo
from jaxinfer.engine.steered import Steered
from jaxinfer.scaleout.inbox import BOTH, Inbox
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.fed import FedScanner

if TYPE_CHECKING:
    from jaxinfer.engine.engine import Engine

_IDLE_WAIT = 0.05  # seconds; an engine that has nothing to do looks for work so often
_AHEAD = (32, 4)  # requests of each side that wait in the engine: as many as may start in one step


def fed(inbox: Inbox, engine: Engine, cost: Cost) -> tuple[Iterator[Request], FedFifo | FedBlend]:
    """The requests of an inbox, and their admission: steered where the machine overlaps compute and memory time."""
    if not cost.joint.overlaps:
        return inbox, FedFifo(inbox, engine)
    admission = FedBlend(inbox, engine, cost)
    return admission.requests(), admission


class FedFifo(Fifo):
    """First come, first served."""

    def __init__(self, inbox: Inbox, engine: Engine):
        super().__init__()
        self._inbox, self._engine = inbox, engine

    def hungry(self, window: int) -> bool:
        return super().hungry(window) and self._inbox.ready(wait=0.0 if self._engine.busy else _IDLE_WAIT)


class FedBlend(Steered):
    """Both sides as a `FedScanner` wants them. A request has the number of a place there from its coming to its end."""

    def __init__(self, inbox: Inbox, engine: Engine, cost: Cost):
        settings = engine.settings.engine
        places = settings.max_seqs + sum(_AHEAD)
        scanner = FedScanner(
            places,
            cost.token_seconds,
            cost.step_seconds,
            engine.memory.pool_tokens,
            settings.max_seqs,
            settings.max_tokens_per_step,
            engine.quantum,
        )
        super().__init__(scanner, places)
        self._inbox, self._engine = inbox, engine
        self._places = list(range(places))
        self._coming: np.ndarray | None = None

    def requests(self) -> Iterator[Request]:
        """In the order in which the engine runs short of either side."""
        while (sent := self._inbox.take(self._short or BOTH)) is not None:
            index, request = self._places.pop(), sent.request
            self._index[request.id], self._side[index] = index, sent.side
            self._scanner.arrive(index, sent.side, len(request.prompt_ids), sent.alone, sent.length)
            yield request
            if request.id in self._index and index not in self._open:  # refused: it was never added
                del self._index[request.id]
                self._scanner.begin(index)
                self._places.append(index)

    @property
    def _short(self) -> list[int]:
        """Sides of which the engine should have more."""
        return [side for side in BOTH if len(self._queues[side]) < _AHEAD[side]]

    def hungry(self, window: int) -> bool:
        if self._coming is not self._inbox.coming:
            self._coming = self._inbox.coming
            self._scanner.outlook(self._coming)
        wait = 0.0 if self._engine.busy else _IDLE_WAIT
        return bool(self._short and self._places) and self._inbox.ready(wait, self._short)

    def _ended(self, index: int, generated: int) -> None:
        super()._ended(index, generated)
        self._places.append(index)
