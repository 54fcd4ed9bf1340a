"""The `jaxinfer-batch` command."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Sequence

from rich.console import Console

from jaxinfer.batch.extras import check_paths, export_output, journal_path, write_extras
from jaxinfer.batch.interruption import Interrupted, Interruption
from jaxinfer.batch.journal import Journal, OutputFile
from jaxinfer.batch.progress import reporter
from jaxinfer.batch.runner import BatchRun, fatal_message
from jaxinfer.batch.source import Source
from jaxinfer.batch.spool import SpoolError, spool_folder
from jaxinfer.batch.survey import Engine
from jaxinfer.batch.tally import Tally
from jaxinfer.config import Settings, load_config
from jaxinfer.errors import JaxInferError, JournalError

ALL_ANSWERED, SOME_ERRORS, FAILED, INTERRUPTED = 0, 1, 2, 130

_EPILOG = """exit status: 0 all rows answered; 1 finished, some rows are errors; 2 wrong usage, config or model;
130 interrupted or out of disk space: the same command goes on where it stopped. A file of --errors, --metrics or
--report that cannot be written is a warning"""
_MAX_NOTICES = 50


def main(argv: Sequence[str] | None = None, *, load_model: Callable[[Settings], Engine] | None = None) -> int:
    """Runs the command; the return value is its exit status."""
    options = _parser().parse_args(argv)
    console = Console(stderr=True, quiet=False)
    with Interruption() as interruption:
        try:
            return _Command(options, console, interruption).run(load_model or _load_model)
        except Interrupted:
            _say(console, "interrupted before the first row; nothing was written")
            return INTERRUPTED
        except SpoolError as error:
            _say(console, f"jaxinfer-batch: {error}; nothing was written")
            return INTERRUPTED
        except Exception as error:  # whatever it is, exit status 1 would say that the run is finished
            _say(console, f"jaxinfer-batch: {fatal_message(error)}")
            return FAILED


class _Command:
    """One call of the command."""

    def __init__(self, options: argparse.Namespace, console: Console, interruption: Interruption):
        self.options, self.console, self.interruption = options, console, interruption
        overrides = list(options.set)
        if options.model is not None:
            overrides.append(f"model.path={json.dumps(options.model)}")
        if options.order is not None:
            overrides.append(f"batch.order={options.order}")
        self.settings = load_config(options.config, overrides)
        if options.ray is not None:
            from jaxinfer.scaleout.ray import planned

            self.settings = planned(self.settings)
        self.tally = Tally()
        self._noticed: set[str] = set()

    def run(self, load_model: Callable[[Settings], Engine]) -> int:
        check_paths(self.options)
        source = Source(self.options.input, max_line_bytes=self.settings.batch.max_line_bytes)
        self.options.journal = journal_path(self.options.output, overwrite=self.options.overwrite)
        output = OutputFile(self.options.journal, overwrite=self.options.overwrite)
        self.tally.size = source.size
        try:
            if self.settings.batch.order == "input":
                output.keep_up_to_retried()
            with self.interruption.exposed():
                run = self._prepare(self._load(load_model), source)
                with self._progress():
                    run.survey(output.kept, output.path)
            batch = self.settings.batch
            journal = output.start(flush_seconds=batch.flush_seconds, sync_seconds=batch.sync_seconds)
        except BaseException:
            output.close()
            raise
        return self._answer(run, journal)

    def _load(self, load_model: Callable[[Settings], Engine]) -> Engine:
        if self.options.ray is None:
            return load_model(self.settings)
        from jaxinfer.scaleout.ray import connect

        fleet = connect(self.settings, self.options.ray)
        self.tally.workers = fleet.state
        return fleet

    def _prepare(self, engine: Engine, source: Source) -> BatchRun:
        return BatchRun(
            engine,
            source,
            self.settings,
            tally=self.tally,
            interruption=self.interruption,
            ignored=self._notice_ignored,
            spool=spool_folder(self.options.journal),
        )

    def _progress(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.options.quiet else reporter(self.tally, self.console)

    def _answer(self, run: BatchRun, journal: Journal) -> int:
        with self._progress():
            failure = self._finish(run, journal)
        if failure is None:
            status = self._export()
        else:
            status = self._explain(failure, journal)
        if not self.options.quiet:
            _say(self.console, self.tally.summary())
        for path, reason in write_extras(self.options, run, self.tally, status):
            _say(self.console, f"jaxinfer-batch: {path} was not written: {fatal_message(reason)}")
        return status

    def _export(self) -> int:
        """The status of a run that answered every row."""
        try:
            export_output(self.options)
        except Exception as error:
            _say(self.console, f"jaxinfer-batch: {fatal_message(error)}")
            _say(
                self.console,
                f"all rows are safe in {self.options.journal}; the same command goes on from there",
            )
            return FAILED
        return SOME_ERRORS if self.tally.all_errors else ALL_ANSWERED

    def _finish(self, run: BatchRun, journal: Journal) -> BaseException | None:
        """Runs to the end or to what stops it; either way the journal is closed whole."""
        failure: BaseException | None = None
        try:
            with self.interruption.exposed():
                run.run(journal)
        except (Exception, Interrupted) as error:
            failure = error
        try:
            journal.close()
        except JournalError as error:
            failure = failure if isinstance(failure, JournalError) else error
        return failure

    def _explain(self, failure: BaseException, journal: Journal) -> int:
        if isinstance(failure, Interrupted):
            _say(self.console, "interrupted")
        elif isinstance(failure, (JaxInferError, MemoryError)):
            _say(self.console, f"jaxinfer-batch: {fatal_message(failure)}")
        else:
            traceback.print_exception(failure, file=sys.stderr)
            _say(self.console, f"jaxinfer-batch: {fatal_message(failure)}")
        _say(self.console, journal.outcome.words(overwrite=self.options.overwrite))
        return INTERRUPTED if isinstance(failure, (Interrupted, JournalError)) else FAILED

    def _notice_ignored(self, name: str) -> None:
        """Says once for each name that a field has no effect; a hostile file cannot make the list grow for ever."""
        if name in self._noticed or len(self._noticed) > _MAX_NOTICES or self.options.quiet:
            return
        self._noticed.add(name)
        last = "; further names are not reported" if len(self._noticed) > _MAX_NOTICES else ""
        _say(self.console, f"warning: {name[:200]} has no effect{last}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxinfer-batch",
        description="Answers every row of an OpenAI batch file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "-i",
        "--input",
        action="append",
        required=True,
        metavar="FILE",
        help="JSON lines, .gz, or -; may be repeated",
    )
    add(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="rows already in it are kept and skipped; .parquet keeps them in FILE.jsonl until it is whole",
    )
    add("--model", metavar="FOLDER", help="a converted model; the embedded one if left out")
    add("--config", metavar="FILE", help="settings in TOML")
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="one setting; wins over --config",
    )
    add(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="answer on the workers of a Ray cluster, without an address of one on this machine; plans as policy blend",
    )
    add("--overwrite", action="store_true", help="start anew even if the output holds rows")
    add("--order", choices=("completion", "input"), help="order of the output rows")
    add("--errors", metavar="FILE", help="write the error rows there as well")
    add("--metrics", metavar="FILE", help="write counts and rates there as JSON")
    add("--report", metavar="FILE", help="write a page with plots there (HTML)")
    add("--quiet", action="store_true", help="no progress, warnings or summary")
    return parser


def _load_model(settings: Settings) -> Engine:
    from jaxinfer.llm import LLM  # late: --help and wrong usage need no accelerator

    return LLM(settings.model.path or None, config=settings)


def _say(console: Console, text: str) -> None:
    with contextlib.suppress(OSError):  # a closed stderr is no reason to lose a run
        console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
