"""What an output file already holds: the rows of an earlier run, read without changing a byte."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import IO

from jaxinfer.batch.identity import ID_PREFIX, DigestSet
from jaxinfer.errors import RETRIED, JournalError

_START = b'{"id":"' + ID_PREFIX.encode()


class Lengths:
    """How long some answers were: of all of a few, of some thousands of many, drawn evenly.

    Attributes:
      by_key: tokens of an answer by its key.
    """

    def __init__(self, most: int = 4096):
        self.by_key: dict[bytes, int] = {}
        self._most = most
        self._below = (
            1 << 32
        )  # keys are hashes: those whose first bytes are a smaller number are an even sample

    def add(self, key: bytes, tokens: int) -> None:
        if self._place(key) >= self._below:
            return
        self.by_key[key] = tokens
        while len(self.by_key) > self._most:
            self._below //= 2
            self.by_key = {key: n for key, n in self.by_key.items() if self._place(key) < self._below}

    @staticmethod
    def _place(key: bytes) -> int:
        return int.from_bytes(key[:4], "big")


@dataclass(slots=True)
class Kept:
    """The rows of an output file.

    Attributes:
      keys: of the rows that stay.
      good_bytes: where whole rows end; what follows was torn off by a crash.
      lacks_newline: the last whole row does.
      retried: rows whose error was not their own; they are dropped and done again.
      errors: by code, of the rows that stay.
      system_fingerprint: of the first answer, None if there is none.
      lengths: of some of the answers.
    """

    keys: DigestSet = field(default_factory=DigestSet)
    good_bytes: int = 0
    lacks_newline: bool = False
    retried: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    system_fingerprint: str | None = None
    lengths: Lengths = field(default_factory=Lengths)


def read_kept(file: IO[bytes], name: str, *, up_to_retried: bool = False) -> Kept:
    """Raises JournalError, with the line's number, for a file that holds anything but our own rows and a torn tail.

    Args:
      up_to_retried: end before the first row that is to be retried.
    """
    kept = Kept()
    for number, line in enumerate(_lines(file, name), start=1):
        row = _parse(line)
        if row is None:
            if line.endswith(b"\n") or not _is_torn(line):
                raise JournalError(f"{name}:{number}: not a row of jaxinfer-batch; --overwrite starts anew")
            return kept
        if up_to_retried and _error_code(row) in RETRIED:
            return kept
        kept.good_bytes += len(line)
        kept.lacks_newline = not line.endswith(b"\n")
        _count(kept, row, f"{name}:{number}")
    return kept


def key_of(line: bytes) -> bytes | None:
    """The digest under which a whole output row is kept; None if it is not a row of ours or is to be retried."""
    row = _parse(line)
    return None if row is None or _error_code(row) in RETRIED else _key(row)


def is_error_row(line: bytes) -> bool:
    row = _parse(line)
    return row is not None and _error_code(row) is not None


def _lines(file: IO[bytes], name: str):
    # A foreign file may be one line of many gigabytes: look at its first byte before reading a line.
    start = file.read(1)
    if start not in (b"", b"{", b"\0"):
        raise JournalError(f"{name}:1: not a row of jaxinfer-batch; --overwrite starts anew")
    file.seek(0, os.SEEK_SET)
    return iter(file.readline, b"")


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return (
        row
        if isinstance(row, dict) and _key(row) is not None and {"response", "error"} <= row.keys()
        else None
    )


def _key(row: dict) -> bytes | None:
    name = row.get("id")
    if not isinstance(name, str) or not name.startswith(ID_PREFIX) or len(name) != len(ID_PREFIX) + 32:
        return None
    try:
        return bytes.fromhex(name[len(ID_PREFIX) :])
    except ValueError:
        return None


def _is_torn(tail: bytes) -> bool:
    """Whether an unfinished last line is ours: the beginning of a row, or the zeros that a power cut leaves."""
    return tail.startswith(_START) or _START.startswith(tail) or not tail.strip(b"\0")


def _count(kept: Kept, row: dict, where: str) -> None:
    code = _error_code(row)
    if code in RETRIED:
        kept.retried += 1
        return
    key = _key(row)
    assert key is not None
    if not kept.keys.add(key):
        raise JournalError(
            f"{where}: answers a request that an earlier line answers; --overwrite starts anew"
        )
    if code is not None:
        kept.errors[code] += 1
        return
    body = _body(row)
    if kept.system_fingerprint is None:
        kept.system_fingerprint = body.get("system_fingerprint")
    usage = body.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if isinstance(tokens, int) and tokens >= 0:
        kept.lengths.add(key, tokens)


def _error_code(row: dict) -> str | None:
    error = row["error"]
    return None if error is None else str(error.get("code")) if isinstance(error, dict) else "unknown"


def _body(row: dict) -> dict:
    """Of an answer; empty if it has none."""
    body = row["response"].get("body") if isinstance(row["response"], dict) else None
    return body if isinstance(body, dict) else {}
