"""Stories of a small world, sentence by sentence, and the questions that they answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.pocket import words
from bench.pocket.words import Source


class Turn(NamedTuple):
    """A question and its one right answer."""

    question: str
    answer: str


class Fact(NamedTuple):
    """What a sentence says. told, asked: phrasings, the last of each held out; {0}, {1}.. are filled with `values`."""

    told: tuple[str, ...]
    asked: tuple[str, ...]
    answer: str


FACTS: dict[str, tuple[Fact, ...]] = {
    "lives": (
        Fact(
            ("{0} lived near the {1}.", "{0} had a small house near the {1}.", "Every evening {0} walked home to the {1}.",
             "The house of {0} stood by the {1}."),
            ("Where did {0} live?", "Where was the home of {0}?", "Do you know where {0} lived?"),
            "{0} lived near the {1}.",
        ),
    ),
    "eats": (
        Fact(
            ("{0} liked {1} best of all.", "{0} could eat {1} every day.", "Nothing tasted better to {0} than {1}.",
             "{0} always asked for {1}."),
            ("What did {0} like to eat?", "What was the best food for {0}?", "Which food did {0} like?"),
            "{0} liked {1}.",
        ),
    ),
    "works": (
        Fact(
            ("{0} worked as a {1}.", "{0} was the {1} of the town.", "{0} had learned to be a {1}.",
             "People knew {0} as a good {1}."),
            ("What was the work of {0}?", "What did {0} work as?", "Which work did {0} do?"),
            "{0} worked as a {1}.",
        ),
    ),
    "hobby": (
        Fact(
            ("{0} loved {1} more than anything.", "In the morning {0} went {1}.", "On quiet days {0} enjoyed {1}.",
             "{0} spent the holidays {1}."),
            ("What did {0} love to do?", "What did {0} enjoy?", "What was the hobby of {0}?"),
            "{0} loved {1}.",
        ),
    ),
    "pet": (
        Fact(
            ("{0} had a {2} {1} called {3}.", "{3} was the {2} {1} of {0}.", "A {2} {1} named {3} lived with {0}.",
             "{0} kept a {2} {1} whose name was {3}."),
            ("What was the name of the {1} of {0}?", "What did {0} call the {1}?", "How was the {1} of {0} named?"),
            "The {1} of {0} was called {3}.",
        ),
        Fact((), ("What colour was {3}?", "Which colour did {3} have?", "Tell me the colour of {3}."), "{3} was {2}."),
    ),
    "put": (
        Fact(
            ("{0} put the {1} in the {2} {3}.", "{0} hid the {1} in the {2} {3}.", "The {1} lay in the {2} {3} of {0}.",
             "{0} left the {1} in the {2} {3}."),
            ("Where was the {1}?", "Where could you find the {1}?", "In what was the {1} kept?"),
            "The {1} was in the {2} {3}.",
        ),
    ),
    "found": (
        Fact(
            ("{0} found a {2} {1} near the {3}.", "Near the {3} {0} saw a {2} {1} and took it.",
             "{0} came back from the {3} with a {2} {1}.", "{0} picked up a {2} {1} at the {3}."),
            ("Who found the {1}?", "Who took the {1}?", "Which person found the {1}?"),
            "{0} found the {1}.",
        ),
        Fact((), ("What colour was the {1}?", "Which colour did the {1} have?", "Tell me the colour of the {1}."),
             "The {1} was {2}."),
        Fact((), ("Where did {0} find the {1}?", "Where was the {1} found?", "At what place did {0} find the {1}?"),
             "{0} found the {1} near the {3}."),
    ),
    "gave": (
        Fact(
            ("{0} gave the {1} to {2}.", "{2} got the {1} from {0}.", "For {2} {0} had brought a {1}.",
             "{0} handed the {1} to {2}."),
            ("Who gave the {1} to {2}?", "From whom did {2} get the {1}?", "Who handed over the {1}?"),
            "{0} gave the {1} to {2}.",
        ),
        Fact((), ("Who got the {1}?", "To whom did {0} give the {1}?", "Who received the {1}?"), "{2} got the {1}."),
    ),
    "cost": (
        Fact(
            ("{0} paid {2} coins for the {1}.", "The {1} of {0} cost {2} coins.", "For {2} coins {0} bought a {1}.",
             "{0} sold the {1} for {2} coins."),
            ("How many coins was the {1}?", "What did the {1} cost?", "What was the price of the {1}?"),
            "The {1} cost {2} coins.",
        ),
    ),
    "age": (
        Fact(
            ("{0} was {1} years old.", "{0} had just turned {1}.", "At the age of {1} {0} still laughed like a child.",
             "{0} had lived for {1} years."),
            ("How old was {0}?", "What was the age of {0}?", "How many years old was {0}?"),
            "{0} was {1} years old.",
        ),
    ),
}  # fmt: skip

OPENINGS = (
    "Once upon a time there were some friends: {0}.",
    "This is the story of {0}.",
    "Long ago, in a small town, lived {0}.",
    "In the old days everybody knew {0}.",
)
AIR = (
    "The sun was warm and the birds sang.", "It rained for a while, and then the sky was clear again.",
    "A cold wind blew from the sea.", "Snow fell on the roofs, and all was quiet.", "The moon was bright that night.",
    "The leaves were turning yellow.", "Nobody said a word.", "Everybody laughed.", "It was a long day.",
    "The children played until it was dark.", "Far away a bell rang.", "The street was empty.",
    "The water was deep and clear.", "A cart rolled slowly down the road.", "There was a smell of fresh bread in the air.",
    "Then they all sat down by the fire.", "The next morning came early.", "Small clouds moved over the hills.",
    "The old clock struck twelve.", "They waited for a long time.", "Somebody knocked at the door.",
)  # fmt: skip
PERSONAL = (
    "{0} felt {mood}.", "{0} was a {mood} {kind}.", '"What a {mood} day," said {0}.', "{0} smiled and looked at {1}.",
    '"Will you come with me?" asked {0}. "Of course," said {1}.', "{0} and {1} were good friends.",
    "{0} wanted to help {1}.", "{0} told {1} an old story.", "One {day} {0} met {1} on the road.",
    "In {season} {0} often thought of {1}.", "{0} was so {mood} that {1} began to laugh.",
    '"I am {mood}," said {0}, and {1} nodded.', "{0} sat down and closed both eyes.", "Soon {0} was fast asleep.",
    "When {day} came, {0} was {mood} again.", "{0} thanked {1} and went on.", "{1} waved, but {0} did not see it.",
)  # fmt: skip
ENDINGS = (
    "And so the day came to an end.", "From then on they were friends for ever.", "And that was the end of the story.",
    "They all went home, tired and happy.",
)  # fmt: skip


@dataclass
class Story:
    """paragraphs joined by newlines are the text; turns: every question that it answers, in the order of the facts."""

    text: str
    turns: list[Turn] = field(default_factory=list)


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
            return person, rng.choice(words.ANIMALS), colour, fresh.name()
        case "put":
            return person, thing, colour, rng.choice(words.HOLDERS)
        case "found":
            return person, thing, colour, rng.choice(words.PLACES)
        case "gave":
            return person, thing, rng.choice(others)
        case "cost":
            return person, thing, source.number(rng.choice((2, 2, 3)))
        case _:
            return person, source.number(2)


class _Fresh:
    """What a story has not used yet: no two facts may answer one question."""

    def __init__(self, source: Source):
        self.source, self.rng = source, source.rng
        self._left: dict[str, list[str]] = {}
        self.names: list[str] = []

    def next(self, pool: str, members: tuple[str, ...]) -> str:
        left = self._left.setdefault(pool, self.rng.sample(members, len(members)))
        return left.pop()

    def left(self, pool: str, members: tuple[str, ...]) -> int:
        return len(self._left.get(pool, members))

    def name(self) -> str:
        while (name := self.source.name()) in self.names:
            pass
        self.names.append(name)
        return name


def story(source: Source, facts: int, chatter: float = 0.5) -> Story:
    """A story of about `facts` facts; `chatter`: other sentences, per fact."""
    rng, fresh = source.rng, _Fresh(source)
    people = [fresh.name() for _ in range(max(2, min(facts // 3 + rng.randint(0, 2), 40)))]
    free = [(person, kind) for person in people for kind in ("lives", "eats", "works", "hobby", "pet", "age")]
    rng.shuffle(free)
    lines, turns = [_opening(people, rng)], []
    for _ in range(facts):
        if free and (rng.random() < 0.55 or fresh.left("thing", words.THINGS) == 0):
            person, kind = free.pop()
        elif fresh.left("thing", words.THINGS):
            person, kind = rng.choice(people), rng.choice(("put", "found", "gave", "cost"))
        else:
            break
        values = _values(kind, person, [other for other in people if other != person], fresh)
        lines.append(source.phrase(FACTS[kind][0].told).format(*values))
        turns += [
            Turn(source.phrase(fact.asked).format(*values), fact.answer.format(*values))
            for fact in FACTS[kind]
        ]
        while rng.random() < chatter / (1 + chatter):
            lines.append(_chatter(people, rng))
    lines.append(rng.choice(ENDINGS))
    return Story(_paragraphs(lines, rng), turns)


def index(source: Source, facts: int) -> Story:
    """Sentences about things, and what belongs to each thing in one line: dense practice in looking backwards."""
    rng, fresh = source.rng, _Fresh(source)
    people = [fresh.name() for _ in range(max(3, facts // 2))]
    lines, turns = [], []
    for _ in range(min(facts, len(words.THINGS))):
        kind, person = rng.choice(("put", "found", "gave", "cost", "found")), rng.choice(people)
        values = _values(kind, person, [other for other in people if other != person], fresh)
        lines.append(source.phrase(FACTS[kind][0].told).format(*values))
        turns.append(Turn(f"the {values[1]}:", " " + " ".join((values[0], *values[2:]))))
    rng.shuffle(turns)
    return Story(" ".join(lines), turns)


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
