"""What a hidden state should hold besides the next token: targets on the way, in training only.

Where a sentence names a value, the model should know the sentence's earlier values; where a question names what it asks
about, the values of that fact. Small probes read them from the middle of the model, and their losses teach its heads to
collect what stands before a word, which the answers alone teach slowly (deep supervision, arXiv:1409.5185).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from tokenizers import Encoding

from bench.pocket.phrases import ROLES
from bench.pocket.stories import Told, Values

KEYS = ("thing", "animal", "pet")  # a story names each but once in a fact
SECOND = len(ROLES)  # slot of a number's second digit
SLOTS = len(ROLES) + 1  # of one level; slots of questions follow those of stories
Hint = tuple[int, int, int]  # place among the ids, slot, token
Encode = Callable[[str], list[int]]


def of_story(told: Iterable[Told], text: str, encoding: Encoding, encode: Encode) -> Iterator[Hint]:
    """At the end of each value of a sentence, the values before it."""
    for sentence, values in told:
        begin = text.index(sentence)
        found = sorted((span, role, value) for role, value in values if (span := _span(value, sentence)))
        for index, ((_, end), _, _) in enumerate(found):
            place = _last(encoding, begin + end)
            for _, role, value in found[:index]:
                yield from _tokens(place, role, value, encode)


def of_question(values: Values, question: str, encoding: Encoding, encode: Encode) -> Iterator[Hint]:
    """At the one value in the question that no other fact has, if there is one, the values that are not in it."""
    named = {role: span for role, value in values if (span := _span(value, question))}
    keys = [named[role] for role in KEYS if role in named]
    for role, value in values if keys else ():
        if role not in named:
            for place, slot, token in _tokens(_last(encoding, keys[0][1]), role, value, encode):
                yield place, slot + SLOTS, token


def _last(encoding: Encoding, end: int) -> int:
    """The token of the character before `end`."""
    place = encoding.char_to_token(end - 1)
    assert place is not None
    return place


def _span(value: str, text: str) -> tuple[int, int] | None:
    found = re.search(rf"\b{re.escape(value)}\b", text)
    return found.span() if found else None


def _tokens(place: int, role: str, value: str, encode: Encode) -> Iterator[Hint]:
    """The first token of a value tells it; of a number both digits."""
    if role == "number":
        first, second, *_ = encode(value)
        yield place, SECOND, second
    else:
        first = encode(" " + value)[0]
    yield place, ROLES.index(role), first
