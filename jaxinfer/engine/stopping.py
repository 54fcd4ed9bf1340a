"""When a choice is over, and what its text is."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from jaxinfer.core import FinishReason, SamplingParams


class Detokenizer(Protocol):
    """Turns token ids into text piece by piece."""

    def feed(self, token: int) -> str: ...


class TextTokenizer(Protocol):
    """What the engine needs to know of text."""

    def decode(self, ids) -> str: ...
    def detokenizer(self) -> Detokenizer: ...


class StopRule:
    """Watches the tokens of one choice, one at a time."""

    def __init__(self, sampling: SamplingParams, eos_ids: tuple[int, ...], tokenizer: TextTokenizer | None):
        self._stop_ids = set(sampling.stop_token_ids)
        self._eos_ids = set() if sampling.ignore_eos else set(eos_ids)
        self._strings = sampling.stop
        self._min_tokens = sampling.min_tokens
        self._longest = max((len(text) for text in sampling.stop), default=0)
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer() if tokenizer is not None and sampling.stop else None
        self._text = ""
        self._seen = 0
        self._cut: int | None = None  # length of the text before a stop string
        self._by_token = False

    def accept(self, token: int) -> FinishReason | None:
        """STOP if the choice ends with this token."""
        self._seen += 1
        if token in self._stop_ids or token in self._eos_ids:
            self._by_token = True
            return FinishReason.STOP
        if self._detokenizer is None:
            return None
        piece = self._detokenizer.feed(token)
        start = max(len(self._text) - self._longest + 1, 0)
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
        if self._cut is not None:
            return self._text[: self._cut]
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(output[: len(output) - self._by_token].tolist())
