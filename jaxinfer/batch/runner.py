"""One batch run: lines -> rows -> requests on disk -> plan -> engine -> output rows -> journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from jaxinfer.batch.history import History
from jaxinfer.batch.identity import run_fingerprint
from jaxinfer.batch.interruption import Interruption
from jaxinfer.batch.journal import Journal
from jaxinfer.batch.kept import Kept
from jaxinfer.batch.output import Answerer, NumberedTokens, error_row
from jaxinfer.batch.reorder import InputOrder
from jaxinfer.batch.rows import row_error
from jaxinfer.batch.source import Lines
from jaxinfer.batch.spool import Refused, Spool, Ticket
from jaxinfer.batch.survey import BlendEngine, Engine, Survey
from jaxinfer.batch.tally import Tally
from jaxinfer.config import Settings
from jaxinfer.core import Completion, Request
from jaxinfer.errors import ENGINE_FAILURE, JaxInferError, JournalError, RequestError
from jaxinfer.schedule.estimate import Estimate
from jaxinfer.schedule.workload import POLICIES, Sharing


class BatchRun:
    """Answers every row of a source into a journal: `survey` reads all rows first, `run` serves them in planned order.

    Attributes:
      history: what a report draws.

    Args:
      spool: folder for what waits on disk; None is the system's for temporary files.
      ignored: hears the name of every field of a row that has no effect.
    """

    def __init__(
        self,
        engine: Engine,
        source: Lines,
        settings: Settings,
        *,
        tally: Tally,
        interruption: Interruption,
        ignored: Callable[[str], None],
        spool: str | None = None,
    ):
        self._engine, self._source, self._settings = engine, source, settings
        self._tally, self._interruption, self._ignored = tally, interruption, ignored
        self._fingerprint = run_fingerprint(engine.model_fingerprint, settings.answers_fingerprint)
        self._answerer = Answerer(engine.model_name, self._fingerprint, engine.tokenizer or NumberedTokens())
        self.history = History()
        self._spool = Spool(settings.batch.spool or spool)
        self._order = np.zeros(0, np.int64)
        self._blend: Any = None  # the plan of policy "blend", which says at each turn who is next
        self._in_flight: dict[str, Ticket] = {}
        self._put: Callable[[int, bytes], None] = lambda place, line: None

    def survey(self, kept: Kept, output: str) -> None:
        """Reads, checks, tokenizes and spills every row that the output does not hold yet, and plans their order.

        Raises:
          JournalError: `kept` has rows that answer no row of this input with this model and these settings.
          SpoolError: the disk cannot hold the requests.
        """
        started = time.monotonic()
        mine = self._answerer.system_fingerprint
        if kept.system_fingerprint not in (None, mine):
            raise JournalError(
                f"{output}: was written with another model or other settings ({kept.system_fingerprint}, "
                f"now {mine}); choose another output, or --overwrite"
            )
        survey = Survey(self._engine, self._spool, self._tally, self._ignored)
        plans = self._settings.schedule.policy == "blend"
        survey.read(self._source, self._fingerprint, kept.keys, kept.lengths.by_key if plans else {})
        if missing := len(kept.keys) - self._tally.kept:
            raise JournalError(
                f"{output}: {missing} of its {len(kept.keys)} rows answer no row of this input with this model; "
                "choose another output, or --overwrite"
            )
        self._tally.kept_errors = kept.errors
        self._plan()
        self._tally.survey_seconds = time.monotonic() - started

    def _plan(self) -> None:
        workload, cache = self._spool.workload(), self._settings.cache
        sharing = Sharing.of(workload, cache.page_size) if cache.prefix_sharing else Sharing.none(workload)
        policy = self._settings.schedule.policy
        if policy == "blend":
            self._blend = cast(BlendEngine, self._engine).blend(workload, sharing)
        else:
            self._order = POLICIES[policy](sharing)
        self._tally.plan(Estimate(workload, sharing), self._computed_tokens())

    def _computed_tokens(self) -> Callable[[], float]:
        """Tokens that went through the model in this run."""
        before = self._engine.metrics().get("computed_tokens", 0)
        return lambda: self._engine.metrics().get("computed_tokens", 0) - before

    def run(self, journal: Journal) -> None:
        """Returns when every row has its line in the journal.

        Raises:
          Interrupted: the user asked for the end.
          JaxInferError: the engine or the journal cannot go on.
        """
        self._put = self._writer(journal)
        self._tally.started = time.monotonic()  # loading and reading are no part of the rates
        self.history = History()
        self._sample()
        if self._blend is None:
            stream = iter(self._engine.stream(self._requests()))
        else:
            stream = iter(cast(BlendEngine, self._engine).stream(self._requests(), self._blend))
        try:
            for completion in stream:
                with self._interruption.shielded():
                    self._finish(completion)
                if self.history.due():
                    self._sample()
        finally:
            if close := getattr(stream, "close", None):
                close()
            self._spool.close()
        for name, ticket in list(self._in_flight.items()):
            error = RequestError(ENGINE_FAILURE, "the engine returned no answer")
            self._finish_error(name, ticket, error)
        self._sample()

    @property
    def model_name(self) -> str:
        return self._engine.model_name

    def engine_metrics(self) -> dict[str, float]:
        return self._engine.metrics()

    def _sample(self) -> None:
        engine = {f"engine_{name}": value for name, value in self._engine.metrics().items()}
        self.history.sample(self._tally.metrics() | engine)

    def _writer(self, journal: Journal) -> Callable[[int, bytes], None]:
        if self._settings.batch.order == "completion":
            return lambda place, line: journal.append(line)
        return InputOrder(journal.append, memory_bytes=self._settings.batch.reorder_bytes).put

    def _requests(self) -> Iterator[Request]:
        """Requests in planned order; rows in error go straight to the journal."""
        for index in self._order if self._blend is None else self._blend.indices():
            row = self._spool.read(int(index))
            if isinstance(row, Refused):
                self._write_refused(row)
            else:
                request, ticket = row
                self._in_flight[request.id] = ticket
                if self._blend is not None:
                    self._blend.expects(request.id, index)
                yield request

    def _write_refused(self, row: Refused) -> None:
        with self._interruption.shielded():
            self._put(row.place, row.line)
            self._tally.errors[row.code] += 1

    def _finish(self, completion: Completion) -> None:
        ticket = self._in_flight[completion.request_id]
        if completion.error is not None:
            self._finish_error(completion.request_id, ticket, completion.error)
            return
        try:
            line = self._answerer.row(ticket.key, ticket.url, completion, created=self._now())
        except (ValueError, TypeError, IndexError, KeyError, RequestError) as error:
            wrong = RequestError(ENGINE_FAILURE, f"the answer cannot be written: {error}")
            self._finish_error(completion.request_id, ticket, wrong)
            return
        del self._in_flight[completion.request_id]
        self._put(ticket.place, line)
        self._tally.answer(completion.usage, ticket.limit)
        self.history.lengths(completion.usage.prompt_tokens, completion.usage.completion_tokens)

    def _finish_error(self, name: str, ticket: Ticket, error: RequestError) -> None:
        refused = row_error(ticket.line, name, error)
        with self._interruption.shielded():
            del self._in_flight[name]
            self._put(
                ticket.place, error_row(ticket.key, name, refused.code, refused.message, ticket.line.number)
            )
            self._tally.errors[refused.code] += 1

    def _now(self) -> int:
        fixed = self._settings.batch.created
        return int(time.time()) if fixed is None else fixed


def fatal_message(error: BaseException) -> str:
    """One line for people about what ended a run."""
    if isinstance(error, JaxInferError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the machine is out of memory; lower cache.memory, engine.max_seqs or batch.reorder_bytes"
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"internal error: {type(error).__name__}: {first}"
