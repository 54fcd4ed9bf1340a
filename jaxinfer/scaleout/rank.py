"""One engine of several: what it tells the driver of itself, and how it serves requests that come bit by bit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jaxinfer.config import Settings
from jaxinfer.core import Completion, Request
from jaxinfer.schedule.cost import Cost
from jaxinfer.version import package_version

if TYPE_CHECKING:
    from jaxinfer.engine.engine import Engine

_IDLE_WAIT = 0.05  # seconds; an engine that has nothing to do looks for work so often


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a rank is.

    Attributes:
      package: version and sources of jaxinfer, see `package_version`.
      model: fingerprint of its checkpoint.
      limits: with `token_limit(request)` of its engine, such as `engine.limits.RequestLimits`.
      pool_tokens: tokens of its KV pool.
      cost: of its model on its machine.
      slots: sequences that it runs at once.
    """

    package: str
    model: str
    limits: Any
    pool_tokens: int
    cost: Cost
    slots: int


class Rank(Protocol):
    """An engine as a worker process holds it."""

    def hello(self) -> Hello: ...

    def serve(self, inbox: Inbox) -> Iterator[Completion]:
        """Completions as they finish, until the inbox is closed."""

    def metrics(self) -> dict[str, float]: ...


class Inbox:
    """Requests that one thread puts in and another takes out; an iterator over them that ends once it is closed and empty."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, requests: Iterable[Request]) -> None:
        with self._changed:
            self._requests.extend(requests)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def ready(self, wait: float = 0.0) -> bool:
        """Whether `next` would return at once; waits for at most so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._requests) or self._closed, wait)

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self._closed)
            if not self._requests:
                raise StopIteration
            return self._requests.popleft()


class LLMRank:
    """`jaxinfer.LLM` as a rank."""

    def __init__(self, settings: Settings):
        from jaxinfer.llm import LLM  # late: a driver needs no engine

        self._llm = LLM(config=settings)

    def hello(self) -> Hello:
        from jaxinfer.schedule.profile import measured

        engine = self._llm.engine
        return Hello(
            package=package_version(),
            model=self._llm.model_fingerprint,
            limits=engine.limits,
            pool_tokens=engine.memory.pool_tokens,
            cost=Cost.of(engine.demand, measured(engine.memory.dtype)),
            slots=engine.settings.engine.max_seqs,
        )

    def serve(self, inbox: Inbox) -> Iterator[Completion]:
        return self._llm.engine.run(inbox, _fed(inbox, self._llm.engine))

    def metrics(self) -> dict[str, float]:
        return self._llm.metrics()


def _fed(inbox: Inbox, engine: Engine) -> Any:
    from jaxinfer.engine.admission import Fifo

    class Fed(Fifo):
        """Asks for requests only when some are there, so that those that run are never held up."""

        def hungry(self, window: int) -> bool:
            return super().hungry(window) and inbox.ready(wait=0.0 if engine.busy else _IDLE_WAIT)

    return Fed()
