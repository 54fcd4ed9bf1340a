"""Small text tasks, each with one right answer, for batches in tests.

A line reads `sort: 5 2 9 1 -> 1 2 5 9`: a question, an arrow, the answer. Lines in a row make a few-shot prompt. Every eighth question, chosen by hash, was never trained on (`held_out`).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

ARROW = " ->"
HEADER = "Answer each line."  # opens about half of the prompts that the model has seen
NAMES = ("Anna", "Tom", "Mia", "Ben", "Lena", "Paul", "Eva", "Max")
THINGS = ("ball", "cup", "key", "book", "hat", "coin", "pen", "ring")
PLACES = ("box", "bag", "drawer", "basket", "garden", "kitchen", "car", "tent")
_LETTERS = "abcdefghijklmnopqrstuvwxyz" + "aeiou" * 3 + "nrstl" * 2


class Item(NamedTuple):
    """One question of a task, without its arrow, and its answer."""

    task: str
    question: str
    answer: str

    @property
    def line(self) -> str:
        return f"{self.question}{ARROW} {self.answer}\n"


def _word(rng: random.Random, low: int, high: int) -> str:
    if rng.random() < 0.05:  # words that are single tokens have to be spelled as well
        return rng.choice(THINGS + PLACES)
    return "".join(rng.choices(_LETTERS, k=rng.randint(low, high)))


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 3, 7)
    return word, word[::-1]


def _upper(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 3, 8)
    return word, word.upper()


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = [rng.choice("0123456789") for _ in range(rng.randint(3, 7))]
    return " ".join(digits), " ".join(sorted(digits))


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{a} + {b}", str(a + b)


def _max(rng: random.Random) -> tuple[str, str]:
    digits = [rng.choice("0123456789") for _ in range(rng.randint(3, 7))]
    return " ".join(digits), max(digits)


def _count(rng: random.Random) -> tuple[str, str]:
    first = rng.randint(100, 999)
    low = first // 100 * 100
    if rng.random() < 0.5:
        return f"{first} up", " ".join(map(str, range(first, low + 100)))
    return f"{first} down", " ".join(map(str, range(first, low - 1, -1)))


def _story(rng: random.Random) -> tuple[str, str]:
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    asked, answer = rng.choice(
        (
            (f"Who put the {thing} there?", name),
            (f"What is in the {place}?", thing),
            (f"Where is the {thing}?", place),
        )
    )
    return f"{name} put the {thing} in the {place}. {asked}", answer


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": _reverse,
    "upper": _upper,
    "sort": _sort,
    "max": _max,
    "add": _add,
    "count": _count,
    "story": _story,
}


def held_out(question: str) -> bool:
    """Whether training left this question out.

    Words that are single tokens are all trained on: nobody can tell from a token how it is spelled.
    """
    return question.split()[-1] not in THINGS + PLACES and zlib.crc32(question.encode()) % 8 == 0


def items(task: str, rng: random.Random, *, unseen: bool) -> Iterator[Item]:
    """Endless random questions of a task: only held-out ones, or only those that training may see."""
    while True:
        body, answer = TASKS[task](rng)
        question = f"{task}: {body}"
        if held_out(question) == unseen:
            yield Item(task, question, answer)
