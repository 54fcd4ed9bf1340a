"""The fixed evaluation set, version 2: the same items for everybody, from names, values and pairs never trained on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from bench.pocket import tasks
from bench.pocket.tasks import Document, Size
from bench.pocket.words import Source

VERSION = 2  # any change of the items needs a new number: later results are compared with earlier ones
COUNT = 500  # items of a task and length
CASES: dict[str, tuple[int, ...]] = {
    "passkey": (1024, 2048, 4096, 8192),
    "lines": (512, 1024, 2048, 4096),
    "story": (512, 1024),
    "story-rephrased": (512,),  # in phrasings that training never used
    "needles": (512, 2048),
    "table": (512,),
    "classify": (512,),
    "count": (128,),
}
ANSWER = 64  # tokens kept free for an answer


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      prompt: all of it; the content of a user's message if `chat`, to be completed as it is otherwise.
      answer: the right one.
      depth: where in the context the answer is, 0-1; None if it is not one place.
    """

    task: str
    prompt: str
    answer: str
    chat: bool
    depth: float | None = None

    def is_right(self, text: str) -> bool:
        """Numbers as Quest and LongChat judge (the first, or the last, of the answer); the rest by their first line, word by word."""
        if self.task == "passkey":
            return _numbers(text)[:1] == _numbers(self.answer)
        if self.task == "lines":
            return _numbers(text)[-1:] == _numbers(self.answer)
        return text.strip().partition("\n")[0] == self.answer.strip()


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def items(task: str, tokens: int, size: Size, count: int = COUNT) -> list[Item]:
    """The first `count` items of at most `tokens` tokens, answer included; passkey's depths go from 0 to 1 in 11 steps."""
    return [_item(task, tokens, size, index) for index in range(count)]


def _item(task: str, tokens: int, size: Size, index: int) -> Item:
    rng = random.Random(f"pocket {VERSION} {task} {tokens} {index}")
    source = Source(rng, unseen=True, phrasing=task == "story-rephrased")
    depth = index % 11 / 10 if task == "passkey" else None
    while not (document := _document(task, source, tokens - ANSWER, size, depth)).turns:
        pass
    question, answer, _ = document.turns[0]
    return Item(task, f"{document.context}\n{question}", answer, document.chat, depth)


def _document(task: str, source: Source, tokens: int, size: Size, depth: float | None) -> Document:
    if task == "passkey":
        return tasks.passkey(source, tokens, size, depth=depth)
    makers: dict[str, Callable[..., Document]] = {"story-rephrased": tasks.story_questions, **tasks.MAKERS}
    return makers[task](source, tokens, size, asked=1)


def held_out_stories(count: int) -> list[str]:
    """Stories of about 300 tokens with people, pets and prices never trained on: for their likelihood."""
    made = (Source(random.Random(f"pocket {VERSION} plain {index}"), unseen=True) for index in range(count))
    return [tasks.plain(source, 300, len).context for source in made]
