"""Stories of a small world, sentence by sentence, and the questions that they answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.pocket import words
from bench.pocket.phrases import AIR, ENDINGS, FACTS, OPENINGS, PARTS, PERSONAL
from bench.pocket.words import Source

Values = tuple[tuple[str, str], ...]
"""What a fact is made of: each value after its role, one of bench.pocket.phrases.ROLES."""


class Turn(NamedTuple):
    """A question and its one right answer; values: of the fact that it asks for, if it is one."""

    question: str
    answer: str
    values: Values = ()


class Told(NamedTuple):
    """A sentence that says a fact."""

    sentence: str
    values: Values


@dataclass
class Story:
    """paragraphs joined by newlines are the text; turns: every question that it answers, in the order of the facts."""

    text: str
    turns: list[Turn] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)


def _values(kind: str, person: str, others: list[str], fresh: _Fresh) -> tuple[str, ...]:
    rng, source = fresh.rng, fresh.source
    thing = fresh.next("thing", words.THINGS) if kind in ("put", "found", "gave", "cost") else ""
    colour = rng.choice(words.COLOURS)
    match kind:
        case "lives":
            return person, rng.choice(words.PLACES)
        case "eats":
            return person, rng.choice(words.FOODS)
        case "works":
            return person, rng.choice(words.ROLES)
        case "hobby":
            return person, rng.choice(words.HOBBIES)
        case "pet":
            return person, fresh.next("animal", words.ANIMALS), colour, fresh.name()
        case "put":
            return person, thing, colour, rng.choice(words.HOLDERS)
        case "found":
            return person, thing, colour, rng.choice(words.PLACES)
        case "gave":
            return person, thing, rng.choice(others)
        case "cost":
            return person, thing, source.number(2)
        case _:
            return person, source.number(2)


class _Fresh:
    """What a story has not used yet: no two facts may answer one question."""

    def __init__(self, source: Source):
        self.source, self.rng = source, source.rng
        self._left: dict[str, list[str]] = {}
        self._begun: set[str] = set()

    def next(self, pool: str, members: tuple[str, ...]) -> str:
        left = self._left.setdefault(pool, self.rng.sample(members, len(members)))
        return left.pop()

    def left(self, pool: str, members: tuple[str, ...]) -> int:
        return len(self._left.get(pool, members))

    def name(self) -> str:
        """One that begins like no other name of the story."""
        while words.first_syllable(name := self.source.name()) in self._begun:
            pass
        self._begun.add(words.first_syllable(name))
        return name


def story(source: Source, facts: int, chatter: float = 0.5) -> Story:
    """A story of about `facts` facts; `chatter`: other sentences, per fact."""
    rng, fresh = source.rng, _Fresh(source)
    people = [fresh.name() for _ in range(max(2, min(facts // 3 + rng.randint(0, 2), 40)))]
    free = [(person, kind) for person in people for kind in ("lives", "eats", "works", "hobby", "pet", "age")]
    rng.shuffle(free)
    made = Story("")
    lines = [_opening(people, rng)]
    for _ in range(facts):
        if free and (rng.random() < 0.55 or fresh.left("thing", words.THINGS) == 0):
            person, kind = free.pop()
            if kind == "pet" and fresh.left("animal", words.ANIMALS) == 0:
                continue
        elif fresh.left("thing", words.THINGS):
            person, kind = rng.choice(people), rng.choice(("put", "found", "gave", "cost"))
        else:
            break
        values = _values(kind, person, [other for other in people if other != person], fresh)
        lines.append(_tell(made, kind, values, source))
        made.turns += [
            Turn(source.phrase(fact.asked).format(*values), fact.answer.format(*values), made.told[-1].values)
            for fact in FACTS[kind]
        ]
        while rng.random() < chatter / (1 + chatter):
            lines.append(_chatter(people, rng))
    lines.append(rng.choice(ENDINGS))
    made.text = _paragraphs(lines, rng)
    return made


def index(source: Source, facts: int) -> Story:
    """Sentences about things and pets, and what belongs to each in one line: dense practice in looking backwards."""
    rng, fresh = source.rng, _Fresh(source)
    people = [fresh.name() for _ in range(max(3, min(facts // 2, 40)))]
    made, lines = Story(""), []
    for _ in range(min(facts, len(words.THINGS))):
        kind, person = rng.choice(("put", "found", "gave", "cost", "cost", "pet")), rng.choice(people)
        if kind == "pet" and fresh.left("animal", words.ANIMALS) == 0:
            continue
        values = _values(kind, person, [other for other in people if other != person], fresh)
        lines.append(_tell(made, kind, values, source))
        key = 3 if kind == "pet" and rng.random() < 0.7 else 1
        answer = "".join(f" {value}" for place, value in enumerate(values) if place != key)
        made.turns.append(Turn(f"the {values[key]}:", answer, made.told[-1].values))
    rng.shuffle(made.turns)
    made.text = " ".join(lines)
    return made


def _tell(story: Story, kind: str, values: tuple[str, ...], source: Source) -> str:
    """A sentence for a fact, noted in the story."""
    sentence = source.phrase(FACTS[kind][0].told).format(*values)
    story.told.append(Told(sentence, tuple(zip(PARTS.get(kind, ("person", "what")), values, strict=True))))
    return sentence


def _opening(people: list[str], rng: random.Random) -> str:
    some = people[:3]
    listed = ", ".join(some[:-1]) + " and " + some[-1]
    return rng.choice(OPENINGS).format(listed)


def _chatter(people: list[str], rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(AIR)
    first, second = rng.sample(people, 2)
    filled = {
        "mood": rng.choice(words.MOODS),
        "kind": rng.choice(words.KINDS),
        "day": rng.choice(words.DAYS),
        "season": rng.choice(words.SEASONS),
    }
    return rng.choice(PERSONAL).format(first, second, **filled)


def _paragraphs(lines: list[str], rng: random.Random) -> str:
    text = lines[0]
    for line in lines[1:]:
        text += (
            "\n" if line in AIR and rng.random() < 0.5 else " "
        ) + line  # a name is other tokens after a newline
    return text
