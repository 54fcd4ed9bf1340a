"""One engine of several: what it tells the driver of itself, and how it serves requests that come bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from jaxinfer.config import Settings
from jaxinfer.core import Completion
from jaxinfer.scaleout.inbox import Inbox
from jaxinfer.schedule.cost import Cost
from jaxinfer.version import package_version


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


class LLMRank:
    """`jaxinfer.LLM` as a rank."""

    def __init__(self, settings: Settings):
        from jaxinfer.llm import LLM  # late: a driver needs no engine

        self._llm = LLM(config=settings)

    def hello(self) -> Hello:
        engine = self._llm.engine
        return Hello(
            package=package_version(),
            model=self._llm.model_fingerprint,
            limits=engine.limits,
            pool_tokens=engine.memory.pool_tokens,
            cost=engine.cost,
            slots=engine.settings.engine.max_seqs,
        )

    def serve(self, inbox: Inbox) -> Iterator[Completion]:
        from jaxinfer.scaleout.fed import fed

        engine = self._llm.engine
        return engine.run(*fed(inbox, engine, engine.cost))

    def metrics(self) -> dict[str, float]:
        return self._llm.metrics()
