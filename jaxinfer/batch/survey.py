"""The first pass over a batch: every row is read, checked, put into tokens and left on disk for its turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from jaxinfer.batch.identity import DigestSet, Identifier
from jaxinfer.batch.output import refused_row
from jaxinfer.batch.rows import Row, RowError, row_error
from jaxinfer.batch.source import Lines
from jaxinfer.batch.spool import Spool, Ticket
from jaxinfer.batch.tally import Tally
from jaxinfer.core import Completion, Request
from jaxinfer.errors import RequestError
from jaxinfer.schedule.workload import Sharing, Workload


class Engine(Protocol):
    """What a run needs of `jaxinfer.LLM`. Its metrics count `computed_tokens`, from which the time left is told."""

    tokenizer: Any
    model_name: str
    model_fingerprint: str

    def token_limit(self, request: Request) -> int: ...

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]: ...
    def metrics(self) -> dict[str, float]: ...


class BlendEngine(Engine, Protocol):
    """What a run under the policy "blend" needs besides."""

    def stream(self, requests: Iterable[Request], plan: Any = None) -> Iterator[Completion]: ...
    def blend(self, workload: Workload, sharing: Sharing) -> Any: ...


class Survey:
    """Puts the rows of a source that are still to be done into a spool.

    Args:
      ignored: hears the name of every field of a row that has no effect, as often as it comes.
    """

    def __init__(self, engine: Engine, spool: Spool, tally: Tally, ignored: Callable[[str], None]):
        self._engine, self._spool, self._tally, self._ignored = engine, spool, tally, ignored
        self._places = 0  # of rows that are still to be done

    def read(self, source: Lines, fingerprint: bytes, done: DigestSet, lengths: Mapping[bytes, int]) -> None:
        """Reads all of `source`; the tally counts its rows, and as kept those in `done`.

        Args:
          fingerprint: of the run, part of every row's key.
          lengths: tokens of those answers in `done` from which the plan learns, by key.

        Raises:
          SpoolError: the disk cannot hold the rows.
        """
        identifier = Identifier(fingerprint, self._ignored)
        for each in map(identifier.identify, source):
            self._tally.read += 1
            self._tally.position = source.position
            if each.key in done:
                self._tally.kept += 1
                if each.key in lengths and isinstance(each.row, Row):
                    self._learn(each.row, lengths[each.key])
            else:
                self._spill(each.key, each.row)

    def _spill(self, key: bytes, row: Row | RowError) -> None:
        place = self._places
        self._places += 1
        if isinstance(row, Row):
            try:
                request, limit = self._request(row)
                self._spool.add(request, Ticket(key, place, row.url, row.line, limit))
                return
            except RequestError as error:
                row = row_error(row.line, row.custom_id, error)
        self._spool.add_refused(place, row.code, refused_row(key, row))

    def _learn(self, row: Row, tokens: int) -> None:
        if row.sampling.beam_width > 1:
            return  # its usage counts the beams that were returned, its work all of them
        with contextlib.suppress(RequestError):  # it fitted the pool of the earlier run, but not this one
            request, limit = self._request(row)
            self._spool.add_answered(request, limit, min(tokens, limit))

    def _request(self, row: Row) -> tuple[Request, int]:
        """And the most tokens of its answer, all choices together."""
        request = Request(id=row.custom_id, prompt_ids=self._encode(row), sampling=row.sampling)
        answer = self._engine.token_limit(request) - len(request.prompt_ids)
        return request, answer * row.sampling.n

    def _encode(self, row: Row) -> np.ndarray:
        """int32 [prompt tokens]. Raises RequestError if the prompt cannot be put into tokens."""
        if row.model and row.model != self._engine.model_name:
            self._ignored(f"model {row.model!r}")
        prompt, tokenizer = row.prompt, self._engine.tokenizer
        if prompt.ids is not None:
            return np.asarray(prompt.ids, np.int32)
        if tokenizer is None:
            raise RequestError("no_tokenizer", "this model has no tokenizer; give the prompt as token ids")
        try:
            text = (
                tokenizer.encode(prompt.text) if prompt.messages is None else tokenizer.chat(prompt.messages)
            )
        except RequestError:
            raise
        except (
            Exception
        ) as error:  # a chat template is a program of the model's author and may raise anything
            name = "messages" if row.is_chat else "prompt"
            raise RequestError("invalid_prompt", f"{name}: {error}") from None
        return np.asarray(text, np.int32)
