"""Input lines, one at a time, from files, gzip files, Parquet files and pipes, in bounded memory."""

from __future__ import annotations

import gzip
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple, Protocol

from jaxinfer.batch import parquet
from jaxinfer.errors import INPUT_UNREADABLE, JaxInferError, RequestError

_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"
_GZIP_ERRORS = (EOFError, zlib.error, OSError)


class InputError(JaxInferError):
    """An input that cannot be read at all: missing, a folder, forbidden, or not what its name says."""


class Line(NamedTuple):
    """One non-blank line.

    Attributes:
      file: name for people.
      number: counted from 1 within its file, blank lines included.
      raw: its bytes without surrounding white space.
      input: index of its file among the inputs.
      problem: why there are no bytes to parse, or None.
    """

    file: str
    number: int
    raw: bytes
    input: int = 0
    problem: RequestError | None = None


class Lines(Protocol):
    """Lines to answer, the same ones at every pass.

    Attributes:
      position: how far the pass in progress has come, for a progress bar.
    """

    @property
    def position(self) -> int: ...

    def __iter__(self) -> Iterator[Line]: ...


class Source:
    """The lines of several inputs in turn.

    Raises:
      InputError: from the constructor, if an input cannot be opened.
    """

    def __init__(self, paths: Sequence[str], *, max_line_bytes: int, stdin: IO[bytes] | None = None):
        self.paths = tuple(paths)
        self.max_line_bytes = max_line_bytes
        self._stdin = stdin
        self._sizes = [_check(path) for path in self.paths]
        self._finished_bytes = 0
        self._open: IO[bytes] | None = None
        if list(self.paths).count("-") > 1:
            raise InputError("-i -: standard input can be read only once")

    @property
    def size(self) -> int | None:
        """Bytes of all inputs as stored; None if one is a pipe."""
        known = [size for size in self._sizes if size is not None]
        return sum(known) if len(known) == len(self._sizes) else None

    @property
    def position(self) -> int:
        """Bytes read so far, for a progress bar."""
        return self._finished_bytes + (self._open.tell() if self._open and not self._open.closed else 0)

    def __iter__(self) -> Iterator[Line]:
        self._finished_bytes = 0
        for index, path in enumerate(self.paths):
            yield from self._lines(index, "<stdin>" if path == "-" else path)
            self._finished_bytes += self._sizes[index] or 0

    def _stored(self, index: int) -> IO[bytes]:
        if self.paths[index] == "-":
            return self._stdin or open(os.dup(sys.stdin.fileno()), "rb", buffering=_BUFFER)
        return open(self.paths[index], "rb", buffering=_BUFFER)

    def _lines(self, index: int, name: str) -> Iterator[Line]:
        number = 0
        try:
            with self._stored(index) as stored:
                for number, raw, too_long in self._pieces(index, name, stored):
                    if too_long:
                        message = f"the row is longer than {self.max_line_bytes} bytes (batch.max_line_bytes)"
                        yield Line(name, number, b"", index, RequestError("line_too_long", message))
                    elif raw:
                        yield Line(name, number, raw, index)
        except _GZIP_ERRORS as error:
            message = f"the file cannot be read beyond line {number}: {error}"
            yield Line(name, number + 1, b"", index, RequestError(INPUT_UNREADABLE, message))
        finally:
            self._open = None

    def _pieces(self, index: int, name: str, stored: IO[bytes]) -> Iterator[tuple[int, bytes, bool]]:
        if name.endswith(parquet.SUFFIX):  # its reader jumps about in the file, so there is no position
            for number, raw in enumerate(parquet.read_lines(stored), start=1):
                yield number, raw, len(raw) > self.max_line_bytes
            return
        self._open = stored if self._sizes[index] is not None else None
        yield from _split(
            gzip.GzipFile(fileobj=stored) if name.endswith(".gz") else stored, self.max_line_bytes
        )


def _split(file, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """(number, stripped bytes, whether it was cut off at the limit) of every line."""
    number = 0
    while raw := file.readline(limit + 1):
        number += 1
        too_long = len(raw) > limit and raw[-1:] != b"\n"
        if too_long:
            while (rest := file.readline(_BUFFER)) and rest[-1:] != b"\n":
                pass
        elif number == 1 and raw.startswith(_BOM):
            raw = raw[len(_BOM) :]
        yield number, raw.strip(), too_long


def _check(path: str) -> int | None:
    """Size of a regular file, None for a pipe."""
    if path == "-":
        return None
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            if stat.S_ISDIR(info.st_mode):
                raise InputError(
                    f"{path}: is a folder; an input is a file of JSON lines, or - for standard input"
                )
            return None
        with open(path, "rb") as stored:
            if path.endswith(".gz"):
                gzip.GzipFile(fileobj=stored).read(1)
            elif path.endswith(parquet.SUFFIX):
                parquet.check(stored)
    except _GZIP_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot read this input: {reason}") from None
    return info.st_size
