"""Training batches: documents as token ids, how much each token counts, and positions that skip ahead."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from bench.pocket import hints, tasks
from bench.pocket.hints import Hint
from bench.pocket.tasks import Document
from bench.pocket.tokenizer import ASSISTANT, BOS, CONTEXT, EOS, USER
from bench.pocket.words import Source

HINTED = 4  # tokens per hint, at least
SKIPPING = 0.5  # share of sequences whose positions jump


class Rows(NamedTuple):
    """ids, positions: int32 [B, L + 1]; weights: float32 [B, L + 1], of each token as a target.

    hints: int32 [B, L // HINTED, 3], place, slot and token (see bench.pocket.hints); slot -1 where there is none.
    """

    ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    hints: np.ndarray


class Data:
    """Batches by (seed, step), so that a resumed training sees what it would have seen."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self._tokenizer, self._seed = tokenizer, seed
        self._breaks = {self.encode(text)[0] for text in (".", "\n")}

    def encode(self, text: str) -> list[int]:
        return self._encoding(text).ids

    def _encoding(self, text: str) -> Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def size(self, text: str) -> int:
        return len(self.encode(text))

    def batch(self, step: int, rows: int, length: int, mix: Mapping[str, float]) -> Rows:
        """`rows` sequences of `length` + 1 tokens; `mix`: how often each task is drawn."""
        rng = random.Random(f"{self._seed} {step}")
        made = [self._row(rng, length + 1, mix) for _ in range(rows)]
        ids, weights = (np.asarray(part) for part in list(zip(*made))[:2])
        positions = np.stack([self._positions(rng, row) for row in ids])
        hinted = np.full((rows, length // HINTED, 3), (0, -1, 0), np.int32)
        for row, (_, _, found) in enumerate(made):
            some = rng.sample(found, min(len(found), length // HINTED))
            hinted[row, : len(some)] = np.reshape(some, (-1, 3))
        return Rows(ids.astype(np.int32), positions, weights.astype(np.float32), hinted)

    def _row(
        self, rng: random.Random, length: int, mix: Mapping[str, float]
    ) -> tuple[list[int], list[float], list[Hint]]:
        source = Source(rng)
        ids: list[int] = []
        weights: list[float] = []
        found: list[Hint] = []
        while len(ids) < length:
            left = length - len(ids)
            if ids and left < 24:
                ids += [EOS] * left
                weights += [0.0] * left
                break
            task = rng.choices(list(mix), list(mix.values()))[0]
            budget = left if rng.random() < 0.6 else rng.randint(min(64, left), left)
            share = rng.uniform(0.45, 0.8) if budget < 2048 else rng.uniform(0.8, 0.93)
            if task == "chunks":
                more, counts = self._chunks(rng, budget)
                told: list[Hint] = []
            else:
                document = tasks.make(
                    task, source, int(budget * share), self.size, asked=max(4, budget // 24)
                )
                more, counts, told = self.document(document, budget)
            found += _moved(told, len(ids))
            ids += more
            weights += counts
        return ids[:length], weights[:length], [hint for hint in found if hint[0] < length - 1]

    def _chunks(self, rng: random.Random, most: int) -> tuple[list[int], list[float]]:
        """Short runs of random tokens, then the same runs in another order: the barest form of looking something up.

        Small alphabets make several tokens of a run necessary to know it by.
        """
        digits = [self.encode(str(d))[0] for d in range(10)]
        every = range(300, self._tokenizer.get_vocab_size())
        alphabet = rng.choice((digits, every[-40:], every, every))
        key = rng.randint(2, 3) if len(alphabet) < 100 else rng.choice((1, 1, 2))
        size = key + rng.choice((1, 1, 2, 3, 5))
        stop = [] if rng.random() < 0.3 else self.encode(rng.choice(("\n", ",", ";")))
        runs: dict[tuple[int, ...], list[int]] = {}
        for _ in range(max(2, most // 2 // (size + len(stop)))):
            run = rng.choices(alphabet, k=size)
            runs[tuple(run[:key])] = run + stop
        again = rng.sample(list(runs.values()), len(runs))
        first = list(runs.values())
        if rng.random() < 0.6:  # what belongs to a key stands before it
            first = [run[key:size] + run[:key] + stop for run in first]
        ids = [BOS, *(t for run in first for t in run), BOS, *(t for run in again for t in run)]
        asked = [0.0] * key + [1.0] * (size - key) + [0.2] * len(stop)
        return ids, [0.0] * (len(ids) - len(again) * len(asked)) + asked * len(again)

    def document(self, document: Document, most: int) -> tuple[list[int], list[float], list[Hint]]:
        """Ids, weights and hints of a document and as many of its questions as fit `most` tokens (one at least)."""
        ids, context = [BOS], document.context
        weights = [0.0]
        if document.chat:
            ids.append(USER)
            weights.append(0.0)
        said = self._encoding(context)
        known = functools.cache(self.encode)
        found = _moved(hints.of_story(document.told, context, said, known), len(ids))
        ids += said.ids
        weights += [document.prose] * len(said.ids)
        if not document.turns:
            return [*ids, EOS], [*weights, document.prose], found
        for index, (question, answer, values) in enumerate(document.turns):
            lead = [USER] if document.chat and index else []
            asked = question if lead else "\n" + question
            encoding = self._encoding(asked)
            hinted = _moved(hints.of_question(values, asked, encoding, known), len(ids) + len(lead))
            lead += encoding.ids
            lead += [ASSISTANT] if document.chat else []
            told = [*self.encode(" " + answer if document.chat else answer), EOS]
            if index and len(ids) + len(lead) + len(told) > most:
                break
            ids += lead + told
            weights += [0.02] * len(lead) + [1.0] * len(told)
            found += hinted
        return ids, weights, found

    def _positions(self, rng: random.Random, ids: np.ndarray) -> np.ndarray:
        """From 0, or with one or two jumps after a sentence, to at most the model's context."""
        length = len(ids)
        positions = np.arange(length, dtype=np.int32)
        if rng.random() >= SKIPPING:
            return positions
        ends = [i for i, token in enumerate(ids.tolist()) if token in self._breaks] or [0]
        room = int((CONTEXT - length) * rng.random() ** 1.5)
        for _ in range(rng.randint(1, 3)):
            jump = rng.randint(0, room)
            positions[rng.choice(ends) + 1 :] += jump
            room -= jump
        return positions


def _moved(found: Iterable[Hint], by: int) -> list[Hint]:
    return [(place + by, slot, token) for place, slot, token in found]
