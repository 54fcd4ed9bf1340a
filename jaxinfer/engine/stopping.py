"""When a choice is over, and what its text is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from jaxinfer.core import FinishReason, SamplingParams


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text piece by piece."""

    def feed(self, ids: Iterable[int]) -> str: ...
    def finish(self) -> str: ...


class TextTokenizer(Protocol):
    """What the engine needs to know of text."""

    def detokenizer(self) -> Detokenizer: ...


def stop_ids(sampling: SamplingParams, eos_ids: Iterable[int]) -> frozenset[int]:
    """The tokens that end an answer."""
    return frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else eos_ids)


class StopRule:
    """Watches the tokens of one choice, one at a time."""

    def __init__(self, sampling: SamplingParams, eos_ids: tuple[int, ...], tokenizer: TextTokenizer | None):
        self._ids = stop_ids(sampling, eos_ids)
        self._strings = sampling.stop
        self._min_tokens = sampling.min_tokens
        self._longest = max((len(text) for text in sampling.stop), default=0)
        self._detokenizer = tokenizer.detokenizer() if tokenizer is not None else None
        self._text = ""  # kept up only where stop strings are looked for
        self._seen = 0
        self._cut: int | None = None  # length of the text before the stop string found
        self._by_token = False

    def accept(self, token: int) -> FinishReason | None:
        """STOP if the choice ends with this token."""
        self._seen += 1
        if token in self._ids:
            self._by_token = True
            return FinishReason.STOP
        if not self._strings or self._detokenizer is None:
            return None
        start = max(len(self._text) - self._longest + 1, 0)
        piece = self._detokenizer.feed([token])
        self._text += piece
        if not piece or self._seen < self._min_tokens:
            return None
        found = [at for text in self._strings if (at := self._text.find(text, start)) >= 0]
        if not found:
            return None
        self._cut = min(found)
        return FinishReason.STOP

    def text_of(self, output: np.ndarray) -> str:
        """The choice's text: without the token or the string that stopped it. output: int32 [generated]."""
        if self._detokenizer is None:
            return ""
        if self._cut is not None:
            return self._text[: self._cut]
        if not self._strings:
            self._text = self._detokenizer.feed(output[: len(output) - self._by_token].tolist())
        return self._text + self._detokenizer.finish()
