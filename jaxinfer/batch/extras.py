"""Files that a run writes beside its output: metrics, error rows, report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterable, Iterator

from jaxinfer.batch import parquet
from jaxinfer.batch.kept import is_error_row
from jaxinfer.batch.report import render
from jaxinfer.batch.runner import BatchRun
from jaxinfer.batch.source import InputError
from jaxinfer.batch.tally import Tally
from jaxinfer.errors import JournalError


def export_output(options: argparse.Namespace) -> None:
    """Writes an output that rows cannot be appended to from the file beside it.

    Raises:
      JournalError: it cannot be written; the rows are safe in the file beside it.
    """
    if options.journal != options.output:
        with open(options.journal, "rb") as rows:
            parquet.export(rows, options.output)


def write_extras(
    options: argparse.Namespace, run: BatchRun, tally: Tally, status: int
) -> Iterator[tuple[str, Exception]]:
    """Yields the path and the reason of every file that cannot be written; the rows are in the output by then."""
    writers = {
        options.metrics: lambda: _write_metrics(options.metrics, run, tally, status),
        options.errors: lambda: _write_errors(options.errors, options.journal),
        options.report: lambda: _write_report(options, run, tally),
    }
    for path, write in writers.items():
        try:
            if path:
                write()
        except Exception as error:  # no fault in a file beside the output may hide what became of the rows
            yield path, error


def _write_metrics(path: str, run: BatchRun, tally: Tally, status: int) -> None:
    numbers = tally.metrics() | {"exit_status": status}
    numbers |= {f"engine_{name}": value for name, value in run.engine_metrics().items()}
    _write_file(path, [json.dumps(numbers, indent=2).encode() + b"\n"])


def _write_errors(path: str, journal: str) -> None:
    with open(journal, "rb") as rows:
        _write_file(path, filter(is_error_row, rows))


def _write_report(options: argparse.Namespace, run: BatchRun, tally: Tally) -> None:
    page = render(
        output=options.output,
        model=run.model_name,
        tally=tally,
        history=run.history,
        metrics=run.engine_metrics(),
    )
    _write_file(options.report, [page.encode()])


def journal_path(output: str, *, overwrite: bool) -> str:
    """Where rows are appended: the output itself, or a file beside it if the output cannot be appended to.

    Raises:
      InputError: a Parquet output that has no such file beside it, so that nothing tells what it answers.
    """
    if not output.endswith(parquet.SUFFIX):
        return output
    try:
        parquet.require()
    except OSError as error:
        raise InputError(f"{output}: {error}") from None
    journal = output + ".jsonl"
    if os.path.exists(output) and not os.path.exists(journal) and not overwrite:
        raise InputError(
            f"{output}: exists without its {journal}, so it cannot be resumed; --overwrite starts anew"
        )
    return journal


def check_paths(options: argparse.Namespace) -> None:
    """No file may be read and written in one run."""
    written = [
        path
        for path in (options.output, options.errors, options.metrics, options.report)
        if path and path != "-"
    ]
    for path in (*options.input, options.config):
        clash = next((other for other in written if path and _same(path, other)), None)
        if clash:
            raise InputError(f"{clash}: is an input of this run; choose another output")
    for path in written:
        if not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):
            raise InputError(f"{path}: the folder {folder} does not exist")
    if len({os.path.realpath(path) for path in written}) < len(written):
        raise InputError("--output, --errors, --metrics and --report must be different files")
    if options.errors and (
        options.output == "-" or (os.path.exists(options.output) and not os.path.isfile(options.output))
    ):
        raise InputError("--errors needs an output that is a file")


def _same(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _write_file(path: str, lines: Iterable[bytes]) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.writelines(lines)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise JournalError(f"{path}: cannot write: {error.strerror}") from None
