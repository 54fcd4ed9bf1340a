"""The output file as a journal: whole rows appended durably, off the critical path, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import threading
import time
from typing import IO

from jaxinfer.batch.kept import Kept, key_of, read_kept
from jaxinfer.batch.outcome import Outcome, Place, find
from jaxinfer.errors import JournalError

_MAX_PENDING = 8 << 20  # bytes; beyond it the caller itself writes, so that a slow disk holds the run back


class OutputFile:
    """The output before the first write: locked and read, not changed. Pipes and devices hold nothing to resume from.

    Raises:
      JournalError: a folder that is not there, a file that another run is writing or that is not ours.
    """

    def __init__(self, path: str, *, overwrite: bool):
        self.path = path
        self.kept = Kept()
        self._file: IO[bytes] | None = None
        self._overwrite = overwrite
        try:
            if path == "-":
                self._file = open(os.dup(1), "wb", buffering=0)  # noqa: SIM115 - `start` hands it to the journal
            elif os.path.exists(path):
                self._read()
            elif not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):
                raise JournalError(f"{path}: the folder {folder} does not exist")
        except OSError as error:
            raise JournalError(f"{path}: cannot use this output: {error.strerror}") from None

    def _read(self) -> None:
        regular = stat.S_ISREG(os.stat(self.path).st_mode)
        self._file = open(self.path, "r+b" if regular else "wb", buffering=0)  # noqa: SIM115
        if regular:
            _lock(self._file, self.path)
            if not self._overwrite:
                with open(self.path, "rb", buffering=1 << 20) as reader:
                    self.kept = read_kept(reader, self.path)

    def keep_up_to_retried(self) -> None:
        """Forgets every row from the first that is to be retried on, so that the rest can follow in its order."""
        if self.kept.retried:
            with open(self.path, "rb", buffering=1 << 20) as reader:
                self.kept = read_kept(reader, self.path, up_to_retried=True)

    def start(self, *, flush_seconds: float, sync_seconds: float) -> Journal:
        """Repairs what a crash tore, drops what is to be retried, and opens for appending."""
        try:
            if self._file is None:
                self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115
                _lock(self._file, self.path)
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode) and self.path != "-":
                self._repair()
        except OSError as error:
            raise JournalError(f"{self.path}: cannot write this output: {error.strerror}") from None
        assert self._file is not None
        return Journal(
            self._file,
            self.path,
            rows=len(self.kept.keys),
            flush_seconds=flush_seconds,
            sync_seconds=sync_seconds,
        )

    def _repair(self) -> None:
        assert self._file is not None
        if self.kept.retried:
            self._file = _without_retried(self._file, os.path.realpath(self.path))
            return
        self._file.truncate(self.kept.good_bytes)
        self._file.seek(0, os.SEEK_END)
        if self.kept.lacks_newline:
            _write_all(self._file.fileno(), b"\n")

    def close(self) -> None:
        """For an output that is given up before `start`."""
        if self._file is not None:
            self._file.close()


class Journal:
    """Appends rows: they reach the operating system every `flush_seconds` and the disk every `sync_seconds`.

    Args:
      rows: that the file holds already.

    Raises:
      JournalError: from `append` or `close`, after the disk filled up, the reader went away, or the file was removed.
        What was written stays whole rows.
    """

    def __init__(
        self, file: IO[bytes], path: str, *, rows: int = 0, flush_seconds: float, sync_seconds: float
    ):
        self.path = path
        self._file = file
        self._regular = path != "-" and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        self._place = Place(path)
        self._written = self._synced = rows
        self._sync_failed = False
        self._end = file.seek(0, os.SEEK_END) if self._regular else 0
        self._flush_seconds, self._sync_seconds = flush_seconds, sync_seconds
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._pending_lock, self._write_lock = threading.Lock(), threading.Lock()
        self._failure: JournalError | None = None
        self._closing = threading.Event()
        self._last_sync = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def append(self, line: bytes) -> None:
        if self._failure:
            raise self._failure
        with self._pending_lock:
            self._pending.append(line)
            self._pending_bytes += len(line)
            full = self._pending_bytes > _MAX_PENDING
        if full or not self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Hands everything to the operating system."""
        with self._write_lock:
            with self._pending_lock:
                # Joined before it is let go: there may be no memory for it.
                data, rows = b"".join(self._pending), len(self._pending)
                self._pending, self._pending_bytes = [], 0
            if rows and not self._failure:
                self._write(data, rows)
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Flushes, syncs, and lets go of the file."""
        self._closing.set()
        self._thread.join()
        try:
            with contextlib.suppress(JournalError):  # raised below, once what was written before is synced
                self.flush()
            self._sync()
            if self._failure:
                raise self._failure
        finally:
            if self._regular:
                self._place = find(self._file.fileno(), self.path)
            self._file.close()

    @property
    def outcome(self) -> Outcome:
        """What the output holds, once closed."""
        unsure = self._written - self._synced if self._sync_failed else 0
        return Outcome(self.path, self._regular, self._place, self._written, unsure)

    def _work(self) -> None:
        while not self._closing.wait(self._flush_seconds or self._sync_seconds or 1.0):
            with contextlib.suppress(JournalError, MemoryError):  # the next append raises it, or tries again
                self.flush()
                if time.monotonic() - self._last_sync >= self._sync_seconds:
                    self._sync()

    def _write(self, data: bytes, rows: int) -> None:
        try:
            _write_all(self._file.fileno(), data)
            self._end += len(data)
            self._written += rows
        except OSError as error:
            if self._regular:
                # Rows of this piece that got through whole are lost too: they are done again, and nothing is torn.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), self._end)
            self._fail(error)

    def _sync(self) -> None:
        self._last_sync = time.monotonic()
        if not self._regular or self._sync_failed:
            return
        rows = self._written
        try:
            os.fsync(self._file.fileno())
            self._synced = rows
        except OSError as error:
            self._sync_failed = True
            self._fail(error)
        else:
            place = find(self._file.fileno(), self.path)
            if place.path != self.path:
                what = "removed" if place.removed else "moved"
                self._failure = JournalError(f"{self.path}: was {what} while the run was writing it")

    def _fail(self, error: OSError) -> None:
        if self._failure:
            return
        reason = {
            errno.ENOSPC: "the disk is full; make room",
            errno.EDQUOT: "the disk quota is used up; make room",
            errno.EPIPE: "the reader of this pipe has gone",
        }.get(error.errno or 0, str(error.strerror or error))
        self._failure = JournalError(f"{self.path}: cannot write: {reason}")


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _lock(file: IO[bytes], path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalError(f"{path}: another run is writing this output") from None


def _without_retried(file: IO[bytes], path: str) -> IO[bytes]:
    """Rewrites the file without the rows that are done again, atomically; the new file is locked before it shows."""
    temporary = f"{path}.{os.getpid()}.tmp"
    new = open(temporary, "xb", buffering=0)  # noqa: SIM115 - the caller keeps it
    try:
        _lock(new, path)
        with open(path, "rb", buffering=1 << 20) as old, open(os.dup(new.fileno()), "wb") as buffered:
            for line in old:
                if key_of(line) is not None:
                    buffered.write(line.rstrip(b"\n") + b"\n")
        shutil.copymode(path, temporary)
        os.fsync(new.fileno())
        os.replace(temporary, path)
    except BaseException:
        new.close()
        os.unlink(temporary)
        raise
    file.close()
    return new
