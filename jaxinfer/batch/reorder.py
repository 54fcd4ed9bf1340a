"""Rows that finish early wait here until all before them are written; beyond a limit they wait on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import IO

from jaxinfer.errors import JournalError


class InputOrder:
    """Passes lines on in the order of their places 0, 1, 2, ...

    Memory: `memory_bytes` of lines plus about 150 bytes for each waiting row.
    """

    def __init__(self, emit: Callable[[bytes], None], *, memory_bytes: int):
        self._emit = emit
        self._memory_bytes = memory_bytes
        self._held_bytes = 0
        self._held: dict[int, bytes | tuple[int, int]] = {}
        self._next = 0
        self._spill: IO[bytes] | None = None
        self._spilled_rows = 0

    def __len__(self) -> int:
        """Rows that wait."""
        return len(self._held)

    def put(self, place: int, line: bytes) -> None:
        if place != self._next:
            self._hold(place, line)
            return
        self._emit(line)
        self._next += 1
        while (held := self._held.pop(self._next, None)) is not None:
            self._emit(self._take(held))
            self._next += 1

    def _hold(self, place: int, line: bytes) -> None:
        if self._held_bytes + len(line) <= self._memory_bytes:
            self._held[place] = line
            self._held_bytes += len(line)
            return
        try:
            self._spill = self._spill or tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
            start = self._spill.seek(0, 2)
            self._spill.write(line)
        except OSError as error:
            raise JournalError(
                f"{tempfile.gettempdir()}: cannot keep rows waiting for their turn: {error.strerror}"
            ) from None
        self._held[place] = (start, len(line))
        self._spilled_rows += 1

    def _take(self, held: bytes | tuple[int, int]) -> bytes:
        if isinstance(held, bytes):
            self._held_bytes -= len(held)
            return held
        assert self._spill is not None
        self._spill.seek(held[0])
        line = self._spill.read(held[1])
        self._spilled_rows -= 1
        if not self._spilled_rows:
            self._spill.truncate(0)
        return line
