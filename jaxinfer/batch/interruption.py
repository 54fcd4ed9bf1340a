"""Ctrl-C and SIGTERM: the first ends the run between two writes, the second ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"
_AGAIN_SECONDS = 0.05


class Interrupted(BaseException):
    """The user wants the run to end. Not an Exception, so that no handler of ordinary errors swallows it."""


class Interruption:
    """While active, the first signal raises Interrupted in the main thread inside `exposed()`, as soon as the running
    device call returns, but not inside `shielded()` within it; the second signal ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._exposed = False
        self._previous: dict[int, object] = {}
        self._report = sys.unraisablehook

    def __enter__(self) -> Interruption:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda *_: self.check())
        self._report, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *_) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        sys.unraisablehook = self._report

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

    def _unraisable(self, what) -> None:
        """Interrupted came up inside a destructor or a callback of the garbage collector, which Python lets nothing
        leave: raise it again a moment later."""
        if isinstance(what.exc_value, Interrupted):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            self._report(what)
