"""The process that holds one engine. It answers what it is sent, a turn at a time, and keeps its prefix cache meanwhile."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxinfer.config import Settings
from jaxinfer.core import Completion
from jaxinfer.errors import EngineError
from jaxinfer.scaleout.inbox import Inbox, Sent
from jaxinfer.scaleout.rank import Hello, Rank

_TURN_SECONDS = 0.2  # longest wait for a completion


@dataclass(frozen=True)
class Turn:
    """Attributes:
    completions: since the last turn.
    metrics: of the engine, now.
    waiting: requests of each side that the engine has not taken.
    """

    completions: list[Completion]
    metrics: dict[str, float]
    waiting: tuple[int, int]


@dataclass(frozen=True)
class Started:
    """Attributes:
    place: for people, where the process runs.
    """

    hello: Hello
    place: str


class Worker:
    """An actor; its engine runs in a thread of its own, so it works on between turns."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._outbox: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None

    def start(self, load: Callable[[Settings], Rank], settings: Settings) -> Started:
        """Load the engine. Raises what loading it raises."""
        self._rank = load(settings)
        hello = self._rank.hello()
        threading.Thread(target=self._work, name="engine", daemon=True).start()
        return Started(hello, f"{socket.gethostname()}, process {os.getpid()}")

    def turn(self, sent: list[Sent], coming: np.ndarray) -> Turn:
        """Hand over requests and collect what has finished, as soon as there is something; after a while also nothing.

        Args:
          coming: float64 [2, 3], the work that the driver still has for this worker.

        Raises:
          Exception: what ended the engine, once all that it finished has been collected.
        """
        self._inbox.put(sent, coming)
        done = self._finished()
        if self._failure is not None and not done:
            raise self._failure
        return Turn(done, self._rank.metrics(), self._inbox.waiting())

    def _finished(self) -> list[Completion]:
        done: list[Completion] = []
        wait: float | None = None if self._failure else _TURN_SECONDS
        try:
            while True:
                completion = self._outbox.get(block=wait is not None, timeout=wait)
                if completion is not None:
                    done.append(completion)
                wait = None
        except queue.Empty:
            return done

    def _work(self) -> None:
        try:
            for completion in self._rank.serve(self._inbox):
                self._outbox.put(completion)
            raise EngineError("the engine stopped serving; this is a fault of ours")
        except BaseException as error:
            self._failure = error
            self._outbox.put(None)  # ends the wait for a completion
