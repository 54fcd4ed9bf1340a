"""Ctrl-C and SIGTERM: the first ends the run between two writes, the second ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


class Interrupted(BaseException):
    """The user wants the run to end. Not an Exception, so that no handler of ordinary errors swallows it."""


class Interruption:
    """While active, the first signal raises Interrupted in the main thread inside `exposed()`, as soon as the running
    device call returns, but not inside `shielded()` within it; the second signal ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._exposed = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def exposed(self) -> Iterator[None]:
        """For work that may stop anywhere."""
        try:
            self._exposed = True
            self.check()
            yield
        finally:
            self._exposed = False

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """For what must not stop halfway. Raises Interrupted at its end if a signal came meanwhile."""
        before, self._exposed = self._exposed, False
        try:
            yield
        finally:
            self._exposed = before
        self.check()

    def check(self) -> None:
        if self.requested and self._exposed:
            raise Interrupted

    def _handle(self, _number, _frame) -> None:
        if self.requested:
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR.encode())
            os._exit(130)
        self.requested = True
        self.check()
