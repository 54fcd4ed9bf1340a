"""Batch files as Parquet: the same columns as the JSON rows, `body`, `response` and `error` as JSON text."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import batched
from typing import IO, Any

from jaxinfer.errors import JournalError

SUFFIX = ".parquet"
NEEDED = ("custom_id", "url", "body")
_ROWS = 4096  # read and written at a time


class ParquetError(OSError):
    """A Parquet file that cannot be read, or the library for it that is missing."""


def check(file: IO[bytes]) -> int:
    """The number of rows. Raises ParquetError for a file that is no Parquet or lacks a column."""
    with _plain_errors():
        opened = _pyarrow().parquet.ParquetFile(file)
        missing = [name for name in NEEDED if name not in opened.schema_arrow.names]
        if missing:
            raise ParquetError(f"it lacks the column {missing[0]}; needed are {', '.join(NEEDED)}")
        return opened.metadata.num_rows


def read_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Every row as one line of JSON. `body` may be JSON text or a struct. Raises ParquetError where it breaks."""
    with _plain_errors():
        for batch in _pyarrow().parquet.ParquetFile(file).iter_batches(batch_size=_ROWS):
            yield from map(json_line, batch.to_pylist())


def json_line(row: dict[str, Any]) -> bytes:
    """A batch row in columns as one line of JSON."""
    body = row.pop("body")
    text = body if isinstance(body, str) else json.dumps(_without_none(body), default=str)
    # The text goes in as it is: what is wrong with it is the row's own error, found where all rows are parsed.
    return f'{json.dumps(row, default=str)[:-1]}, "body": {text}}}'.encode("utf-8", "surrogatepass").replace(
        b"\n", b" "
    )


def _without_none(value):
    """Structs give every row the fields of all rows; those that a row does not have are None."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def export(lines: Iterable[bytes], path: str) -> None:
    """Writes output rows to a Parquet file, which appears whole or not at all."""
    pyarrow = _pyarrow()
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with pyarrow.parquet.ParquetWriter(temporary, table([]).schema, compression="zstd") as writer:
            for some in batched(lines, _ROWS):
                writer.write_table(table(some))
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise JournalError(f"{path}: cannot write: {error.strerror or error}") from None


def table(lines: Iterable[bytes]) -> Any:
    """Output rows as a pyarrow table of strings."""
    pyarrow = _pyarrow()
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "custom_id", "response", "error")])
    return pyarrow.Table.from_pylist([_cells(json.loads(line)) for line in lines], schema)


def _cells(row: dict[str, Any]) -> dict[str, str | None]:
    texts = {name: None if row[name] is None else json.dumps(row[name]) for name in ("response", "error")}
    return {"id": row["id"], "custom_id": row["custom_id"]} | texts


def require() -> None:
    """Raises ParquetError if pyarrow is not installed."""
    _pyarrow()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ParquetError("Parquet needs pyarrow: pip install 'jaxinfer[parquet]'") from None
    return pyarrow


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    arrow = _pyarrow().lib.ArrowException
    try:
        yield
    except arrow as error:
        raise ParquetError(str(error)) from None
