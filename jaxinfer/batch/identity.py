"""What a row of the output answers: a hash of (input line, model, settings that change answers) is its id."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from jaxinfer.batch.rows import Row, RowError, parse_row, row_error
from jaxinfer.batch.source import Line
from jaxinfer.errors import RequestError

ID_PREFIX = "batch_req_"
_FORMAT = b"jaxinfer batch 1"  # part of every hash: a new meaning of ids gets a new number
_SLOT = 16
_FREE = bytes(_SLOT)


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for these parts; different splits of the same bytes differ."""
    hasher = hashlib.blake2b(digest_size=_SLOT)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


def run_fingerprint(model_fingerprint: str, settings_fingerprint: str) -> bytes:
    """16 bytes that stand for everything but the row on which an answer depends."""
    return digest(_FORMAT, model_fingerprint.encode(), settings_fingerprint.encode())


class DigestSet:
    """A set of 16-byte digests in one bytearray with open addressing: 24 to 48 bytes an entry, against ~110 in a `set`."""

    def __init__(self) -> None:
        self._slots = 1024
        self._table = bytearray(self._slots * _SLOT)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: bytes) -> bool:
        return self._find(key)[1]

    def add(self, key: bytes) -> bool:
        """Whether it was new."""
        at, found = self._find(key)
        if not found:
            self._table[at : at + _SLOT] = key
            self._size += 1
            if self._size * 3 > self._slots * 2:
                self._grow()
        return not found

    def _find(self, key: bytes) -> tuple[int, bool]:
        """(offset of its slot or of the free slot where it belongs, whether it is there). A free slot is all zeros."""
        table, end = self._table, self._slots * _SLOT
        at = int.from_bytes(key[:8], "little") % self._slots * _SLOT
        while True:
            held = table[at : at + _SLOT]
            if held == key:
                return at, True
            if held == _FREE:
                return at, False
            at = at + _SLOT if at + _SLOT < end else 0

    def _grow(self) -> None:
        old = self._table
        self._slots *= 2
        self._table = bytearray(self._slots * _SLOT)
        for start in range(0, len(old), _SLOT):
            key = bytes(old[start : start + _SLOT])
            if key != _FREE:
                at, _ = self._find(key)
                self._table[at : at + _SLOT] = key


@dataclass(frozen=True, slots=True)
class Identified:
    """A parsed line and the digest under which its answer is kept."""

    key: bytes
    row: Row | RowError


class Identifier:
    """Parses the lines of one pass over the input, names them, and catches a custom_id that comes twice."""

    def __init__(self, run: bytes, ignored: Callable[[str], None]):
        self._run = run
        self._ignored = ignored
        self._seen = DigestSet()

    def identify(self, line: Line) -> Identified:
        row = parse_row(line, self._ignored)
        if row.custom_id is None:
            return Identified(self._positioned(line), row)
        if not self._seen.add(digest(row.custom_id.encode())):
            error = RequestError(
                "duplicate_custom_id", f"custom_id {row.custom_id!r} was used by an earlier row"
            )
            return Identified(self._positioned(line), row_error(line, row.custom_id, error))
        return Identified(digest(self._run, line.raw), row)

    def _positioned(self, line: Line) -> bytes:
        """Lines that no custom_id tells apart are told apart by their place."""
        return digest(self._run, line.raw, b"%d:%d" % (line.input, line.number))
