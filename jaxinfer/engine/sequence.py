"""The state of one choice of one request while the engine works on it."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.core import FinishReason, Request, TokenLogprob
from jaxinfer.errors import RequestError
from jaxinfer.kvcache.prefix import Node

if TYPE_CHECKING:
    from jaxinfer.engine.beams import Beams


class Sequence:
    """A prompt and the tokens that follow it.

    The host plans steps before it has read the tokens of earlier ones. So there are three counts: `known` tokens have
    reached the host, `planned` tokens exist once the planned steps have run, and of those the first
    `computed` have their keys in the pool then.

    Attributes:
      choice: which of the request's n choices this is.
      limit: most tokens, prompt included.
      seed: the two words of its random key, int32 each.
      uploaded: the device's slot holds what its penalties, biases and minimum length need.
      namespace: sequences share prefixes within one namespace only (rotary scaling by length).
      rope_floor: shortest sequence length that governs the rotation of its tokens.
      dense_tokens: tokens from here on choose the pages they attend to, so they are computed one at a time, and their keys
        are those of this sequence alone; all before attend to everything.
      decoding: the next input token is the one sampled last, which the device still holds.
      slot: row of the device's per-sequence state while running, else -1.
      pages: its page table.
      nodes: the tree nodes of those of its pages that the tree shares.
      tail: tree node of its last published page.
      published: leading pages passed on to the tree, or found there.
      awaited, awaited_tokens: another sequence, and how many of its tokens, which both share, it is about to compute:
        while it has not, this one waits.
      cached_tokens: prompt tokens whose keys were found at its first admission.
      prompt_logprobs: float32 [prompt_length - 1], scored sequences only.
      beams: the beam search that it is a beam of, else None. Its next token is chosen among those of all beams, so nothing
        is planned for it before the host has read what was planned.
      forked_from: slot whose state it goes on with, a beam that decodes.
      copied: pages (from, to): it goes on in a copy of a page that other beams have too, once the device has made it.
      source, source_tokens: a beam that starts again shares the pages of these first tokens of another, once computed.
    """

    def __init__(
        self,
        request: Request,
        choice: int,
        *,
        limit: int,
        namespace: int = 0,
        seed: tuple[int, int] = (0, 0),
        dense_tokens: int = sys.maxsize,
    ):
        self.request = request
        self.seed = seed
        self.choice = choice
        self.limit = limit
        self.namespace = namespace
        self.dense_tokens = dense_tokens
        self.prompt_length = len(request.prompt_ids)
        self.rope_floor = self.prompt_length
        self._tokens = np.empty(self.prompt_length + 64, np.int32)
        self._tokens[: self.prompt_length] = request.prompt_ids
        self.known = self.prompt_length
        self.cached_tokens: int | None = None
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs = np.empty(self.prompt_length - 1, np.float32) if request.score else None
        self.beams: Beams | None = None
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self.rewind()

    def rewind(self) -> None:
        """Forget every computed key: the sequence starts again from the tokens that are known."""
        self.planned = self.known
        self.computed = 0
        self.decoding = False
        self.slot = -1
        self.uploaded = False
        self.pages: list[int] = []
        self.nodes: list[Node] = []
        self.tail: Node | None = None
        self.published = 0
        self.awaited: Sequence | None = None
        self.awaited_tokens = 0
        self.forked_from = -1
        self.copied: tuple[int, int] | None = None
        self.source: Sequence | None = None
        self.source_tokens = 0

    def fork(self, slot: int) -> Sequence:
        """Another beam in `slot` with the same tokens and page table; the caller counts the owners of its pages."""
        other = copy.copy(self)
        other._tokens = self._tokens.copy()
        other.pages, other.nodes = list(self.pages), list(self.nodes)
        other.slot, other.forked_from = slot, self.slot
        return other

    @property
    def siblings(self) -> list[Sequence]:
        """The beams of its search, itself among them; itself alone where there is none."""
        return [self] if self.beams is None else list(self.beams.sequences)

    @property
    def job(self) -> Sequence | Beams:
        """What is answered as one: the sequence, or the search that it is a beam of."""
        return self if self.beams is None else self.beams

    @property
    def awaits_prefix(self) -> bool:
        """Whether the sequence that computes its prefix has still to get there."""
        other = self.awaited
        if other is not None and (
            other.finished or other.slot < 0 or other.decoding or other.computed >= self.awaited_tokens
        ):
            self.awaited = None
        return self.awaited is not None

    @property
    def tokens(self) -> np.ndarray:
        """int32 [known]: prompt and known generated tokens."""
        return self._tokens[: self.known]

    @property
    def output(self) -> np.ndarray:
        return self._tokens[self.prompt_length : self.known]

    @property
    def generated(self) -> int:
        return self.known - self.prompt_length

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to plan."""
        return self.planned >= self.limit and (self.decoding or self.computed >= self.limit)

    @property
    def ready(self) -> bool:
        """Whether something can be planned for it."""
        return not self.exhausted and (self.beams is None or self.planned <= self.known)

    def append(self, token: int) -> None:
        if self.known == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        self._tokens[self.known] = token
        self.known += 1

    def advance(self, count: int) -> None:
        """Book a planned step that computes `count` tokens; when none is left it samples the next."""
        self.computed += count
        if self.decoding:
            self.planned += count
        elif self.computed == self.planned and not self.request.score:
            self.decoding = True
            self.planned += 1


def common_length(tokens: np.ndarray, others: np.ndarray) -> int:
    """Length of the common beginning."""
    length = min(len(tokens), len(others))
    differ = np.flatnonzero(tokens[:length] != others[:length])
    return int(differ[0]) if len(differ) else length
