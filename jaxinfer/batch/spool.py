"""Requests on disk between the survey of a batch and their turn: what stays in memory is some 50 bytes a row."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from array import array
from typing import IO, NamedTuple

import numpy as np

from jaxinfer.batch.source import Line
from jaxinfer.core import Request, SamplingParams
from jaxinfer.errors import ConfigError, JaxInferError
from jaxinfer.schedule.workload import Workload

_BUFFER = 1 << 20
_SHARED = 1024
_NO_IDS = np.zeros(0, np.int32)


class SpoolError(JaxInferError):
    """The disk cannot hold the requests."""


class Ticket(NamedTuple):
    """What is remembered of a row until its output line is written.

    Attributes:
      key: digest under which its answer is kept, 16 bytes.
      place: its turn under input order.
      line: where it stood, without its bytes.
      limit: most tokens to generate, all choices together.
    """

    key: bytes
    place: int
    url: str
    line: Line
    limit: int


class Refused(NamedTuple):
    """A row that is not served: its turn, its error code and its finished output line."""

    place: int
    code: str
    line: bytes


class Spool:
    """Rows are added in turn, then read in any order. The files have no name: whatever ends the process frees them.

    A row is a request with its ticket, or the finished output line of a row that was refused.

    Args:
      folder: on whose disk; None is the system's folder for temporary files.

    Raises:
      ConfigError: from the constructor, if the folder cannot be written.
      SpoolError: from the other methods, if its disk is full.
    """

    def __init__(self, folder: str | None):
        self._folder = folder or tempfile.gettempdir()
        self._rows, self._tokens = self._open(), self._open()
        self._ends, self._token_ends = array("Q"), array("Q")
        self._limits, self._floors, self._answered = array("q"), array("q"), array("q")
        self._row_bytes = self._token_count = 0
        self._samplings: list[SamplingParams] = []
        self._sampling_index: dict[int, int] = {}  # by identity

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, request: Request, ticket: Ticket) -> None:
        line = ticket.line
        sampling = self._short(request.sampling)
        record = (request.id, sampling, ticket.key, ticket.place, ticket.url, ticket.limit)
        work = ticket.limit // request.sampling.n * request.sampling.sequences
        floor = _fewest_tokens(request.sampling, work)
        self._append((*record, line.file, line.number, line.input), request.prompt_ids, work, floor)

    def add_answered(self, request: Request, limit: int, tokens: int) -> None:
        """A request that is not to be read again: its answer, of at most `limit` tokens in all, has so many."""
        floor = _fewest_tokens(request.sampling, limit)
        self._append((), request.prompt_ids, limit, floor, answered=tokens)

    def _short(self, sampling: SamplingParams) -> SamplingParams | int:
        """A number for each of the first objects, which rows of a batch mostly share: most of a record, else."""
        index = self._sampling_index.get(id(sampling))
        if index is not None:
            return index
        if len(self._samplings) == _SHARED:
            return sampling
        self._sampling_index[id(sampling)] = len(self._samplings)
        self._samplings.append(sampling)
        return len(self._samplings) - 1

    def add_refused(self, place: int, code: str, line: bytes) -> None:
        self._append((place, code, line), _NO_IDS, 0)

    def workload(self) -> Workload:
        """The shape of all rows, answered ones among them; a refused one is a prompt of no tokens."""
        self._flushed()
        tokens = _NO_IDS
        if self._token_count:
            tokens = np.memmap(self._tokens, np.int32, "r", shape=(self._token_count,))
        starts = np.zeros(len(self) + 1, np.int64)
        starts[1:] = self._token_ends
        limits, floors, answered = (
            np.array(column, np.int64) for column in (self._limits, self._floors, self._answered)
        )
        return Workload(
            tokens=tokens, starts=starts, answer_limits=limits, answer_floors=floors, answered=answered
        )

    def read(self, index: int) -> tuple[Request, Ticket] | Refused:
        record = pickle.loads(_read(self._rows, self._ends, index, 1))
        if len(record) == len(Refused._fields):
            return Refused(*record)
        name, sampling, key, place, url, limit, file, number, file_index = record
        ids = np.frombuffer(_read(self._tokens, self._token_ends, index, 4), np.int32)
        line = Line(file, number, b"", file_index)
        sampling = self._samplings[sampling] if isinstance(sampling, int) else sampling
        return Request(id=name, prompt_ids=ids, sampling=sampling), Ticket(key, place, url, line, limit)

    def close(self) -> None:
        for file in (self._rows, self._tokens):
            with contextlib.suppress(OSError):  # what a full disk left in the buffer
                file.close()

    def _append(
        self, record: tuple, ids: np.ndarray, limit: int, floor: int = 0, *, answered: int = -1
    ) -> None:
        data = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        try:
            self._rows.write(data)
            self._tokens.write(ids.astype(np.int32, copy=False).tobytes())
        except OSError as error:
            raise self._error(error) from None
        self._row_bytes += len(data)
        self._token_count += len(ids)
        self._ends.append(self._row_bytes)
        self._token_ends.append(self._token_count)
        self._limits.append(limit)
        self._floors.append(floor)
        self._answered.append(answered)

    def _flushed(self) -> None:
        try:
            self._rows.flush()
            self._tokens.flush()
        except OSError as error:
            raise self._error(error) from None

    def _open(self) -> IO[bytes]:
        try:
            return tempfile.TemporaryFile(dir=self._folder, buffering=_BUFFER)
        except OSError as error:
            raise ConfigError(
                f"batch.spool = {self._folder}: cannot hold the requests that wait: {error.strerror}"
            ) from None

    def _error(self, error: OSError) -> SpoolError:
        return SpoolError(
            f"{self._folder}: cannot hold the requests that wait: {error.strerror}; make room, or name a folder "
            "on a larger disk as batch.spool"
        )


def _fewest_tokens(sampling: SamplingParams, limit: int) -> int:
    """Of all choices, or beams: all tokens where nothing but the limit ends an answer."""
    if sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids:
        return limit
    return min(sampling.min_tokens * sampling.sequences, limit)


def _read(file: IO[bytes], ends: array, index: int, size: int) -> bytes:
    start = ends[index - 1] * size if index else 0
    return os.pread(file.fileno(), ends[index] * size - start, start)


def spool_folder(output: str) -> str | None:
    """Beside an output that is a file, whose disk is the one meant to hold much, if that can be; else None."""
    folder = os.path.dirname(os.path.abspath(output))
    is_file = output != "-" and (os.path.isfile(output) or not os.path.exists(output))
    return folder if is_file and os.access(folder, os.W_OK) else None
