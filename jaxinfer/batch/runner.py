"""One batch run: lines -> rows -> requests -> engine -> output rows -> journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxinfer.batch.history import History
from jaxinfer.batch.identity import DigestSet, Identified, Identifier, run_fingerprint
from jaxinfer.batch.interruption import Interruption
from jaxinfer.batch.journal import Journal
from jaxinfer.batch.kept import Kept
from jaxinfer.batch.output import Answerer, NumberedTokens, error_row, refused_row
from jaxinfer.batch.reorder import InputOrder
from jaxinfer.batch.rows import Row, row_error
from jaxinfer.batch.source import Line, Source
from jaxinfer.batch.tally import Tally
from jaxinfer.config import Settings
from jaxinfer.core import Completion, Request
from jaxinfer.errors import ENGINE_FAILURE, JaxInferError, JournalError, RequestError


class Engine(Protocol):
    """What a run needs of `jaxinfer.LLM`."""

    tokenizer: Any
    model_name: str
    model_fingerprint: str

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]: ...
    def metrics(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class _InFlight:
    """What is remembered of a request until its completion comes."""

    key: bytes
    place: int
    url: str
    line: Line  # without its bytes


class BatchRun:
    """Answers every row of a source into a journal.

    Attributes:
      history: what a report draws.

    Args:
      ignored: hears the name of every field of a row that has no effect, as often as it comes.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        settings: Settings,
        *,
        tally: Tally,
        interruption: Interruption,
        ignored: Callable[[str], None],
    ):
        self._engine, self._source, self._settings = engine, source, settings
        self._tally, self._interruption, self._ignored = tally, interruption, ignored
        self._fingerprint = run_fingerprint(engine.model_fingerprint, settings.answers_fingerprint)
        self._answerer = Answerer(engine.model_name, self._fingerprint, engine.tokenizer or NumberedTokens())
        self.history = History()
        self._in_flight: dict[str, _InFlight] = {}
        self._done = DigestSet()
        self._places = 0
        self._put: Callable[[int, bytes], None] = lambda place, line: None

    def check_kept(self, kept: Kept, path: str) -> None:
        """Raises JournalError unless every kept row answers a row of this input with this model and these settings.

        Reads the input only as far as the kept rows reach.
        """
        mine = self._answerer.system_fingerprint
        if kept.system_fingerprint not in (None, mine):
            raise JournalError(
                f"{path}: was written with another model or other settings ({kept.system_fingerprint}, "
                f"now {mine}); choose another output, or --overwrite"
            )
        missing = len(kept.keys)
        if missing:
            self._source.make_rereadable()
            for identified in self._identified(lambda name: None):
                missing -= identified.key in kept.keys
                if not missing:
                    break
        if missing:
            raise JournalError(
                f"{path}: {missing} of its {len(kept.keys)} rows answer no row of this input with this model; "
                "choose another output, or --overwrite"
            )
        self._done = kept.keys
        self._tally.kept_errors = kept.errors

    def run(self, journal: Journal) -> None:
        """Returns when every row has its line in the journal.

        Raises:
          Interrupted: the user asked for the end.
          JaxInferError: the engine or the journal cannot go on.
        """
        self._put = self._writer(journal)
        self._tally.started = time.monotonic()  # loading the model is no part of the rates
        self.history = History()
        self._sample()
        stream = iter(self._engine.stream(self._requests()))
        try:
            for completion in stream:
                self._finish(completion)
                self._interruption.check()
                if self.history.due():
                    self._sample()
        finally:
            if close := getattr(stream, "close", None):
                close()
        for name, flight in list(self._in_flight.items()):
            error = RequestError(ENGINE_FAILURE, "the engine returned no answer")
            self._finish_error(name, flight, error)
        self._sample()
        self._tally.position = self._source.size or 0

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

    def _identified(self, ignored: Callable[[str], None]) -> Iterator[Identified]:
        identifier = Identifier(self._fingerprint, ignored)
        return map(identifier.identify, self._source)

    def _requests(self) -> Iterator[Request]:
        """Requests of all rows that are not done yet; rows in error go straight to the journal."""
        for key, row in ((each.key, each.row) for each in self._identified(self._ignored)):
            self._tally.position = self._source.position
            self._tally.read += 1
            if key in self._done:
                self._tally.kept += 1
                continue
            place, self._places = self._places, self._places + 1
            encoded = self._encode(row) if isinstance(row, Row) else row
            if isinstance(encoded, Request):
                assert isinstance(row, Row)
                line = row.line._replace(raw=b"")
                self._in_flight[encoded.id] = _InFlight(key, place, row.url, line)
                yield encoded
            else:
                self._write_refused(place, key, encoded)

    def _encode(self, row: Row):
        """The request, or a RowError if the prompt cannot be put into tokens."""
        if row.model and row.model != self._engine.model_name:
            self._ignored(f"model {row.model!r}")
        prompt, tokenizer = row.prompt, self._engine.tokenizer
        try:
            if prompt.ids is not None:
                ids = prompt.ids
            elif tokenizer is None:
                raise RequestError(
                    "no_tokenizer", "this model has no tokenizer; give the prompt as token ids"
                )
            elif prompt.messages is not None:
                ids = tokenizer.chat(prompt.messages)
            else:
                ids = tokenizer.encode(prompt.text)
        except RequestError as error:
            return row_error(row.line, row.custom_id, error)
        except (
            Exception
        ) as error:  # a chat template is a program of the model's author and may raise anything
            name = "messages" if row.is_chat else "prompt"
            return row_error(row.line, row.custom_id, RequestError("invalid_prompt", f"{name}: {error}"))
        return Request(id=row.custom_id, prompt_ids=np.asarray(ids, np.int32), sampling=row.sampling)

    def _write_refused(self, place: int, key: bytes, error) -> None:
        with self._interruption.shielded():
            self._put(place, refused_row(key, error))
            self._tally.errors[error.code] += 1

    def _finish(self, completion: Completion) -> None:
        flight = self._in_flight[completion.request_id]
        if completion.error is not None:
            self._finish_error(completion.request_id, flight, completion.error)
            return
        try:
            line = self._answerer.row(flight.key, flight.url, completion, created=self._now())
        except (ValueError, TypeError, IndexError, KeyError, RequestError) as error:
            wrong = RequestError(ENGINE_FAILURE, f"the answer cannot be written: {error}")
            self._finish_error(completion.request_id, flight, wrong)
            return
        with self._interruption.shielded():
            del self._in_flight[completion.request_id]
            self._put(flight.place, line)
            self._tally.answer(completion.usage)
            self.history.lengths(completion.usage.prompt_tokens, completion.usage.completion_tokens)

    def _finish_error(self, name: str, flight: _InFlight, error: RequestError) -> None:
        refused = row_error(flight.line, name, error)
        with self._interruption.shielded():
            del self._in_flight[name]
            self._put(
                flight.place, error_row(flight.key, name, refused.code, refused.message, flight.line.number)
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
