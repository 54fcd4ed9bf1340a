"""The tasks: a context of a wanted length, and questions on it with one right answer each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from bench.pocket import words
from bench.pocket.phrases import AIR
from bench.pocket.stories import Told, Turn, story
from bench.pocket.stories import index as story_index
from bench.pocket.words import Source

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # Quest's filler
PASSKEY_HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
LINES_HEAD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "
    "certain line index. Now the record start:\n"
)
LINES_QUESTION = "Tell me what is the <REGISTER_CONTENT> in line {0}? I need the number."
LINES_SHORT = ("line {0}?", "What is in line {0}?")  # in training, beside the longer forms


@dataclass(frozen=True)
class Document:
    """A context and questions on it.

    Attributes:
      chat: the first question follows the context in a user's message, further ones are further messages; otherwise
        questions and answers follow the context as plain text.
      prose: how much each token of the context counts in training, beside 1 for the answers'.
      told: the facts that sentences of the context say.
    """

    task: str
    context: str
    turns: list[Turn] = field(default_factory=list)
    chat: bool = True
    prose: float = 0.1
    told: list[Told] = field(default_factory=list)


Size = Callable[[str], int]
"""Tokens of a text."""


def passkey(
    source: Source, tokens: int, size: Size, *, depth: float | None = None, keys: int = 1
) -> Document:
    """Pass keys in filler, as the Quest paper evaluates (its prompt goes back to landmark attention).

    Args:
      tokens: of the whole prompt, about; never more.
      depth: where the key is, 0 at the beginning, 1 at the end; None for anywhere.
      keys: with more than one, each has a name.
    """
    rng = source.rng
    owners = source.several(source.name, keys) if keys > 1 else [""]
    values = source.several(source.number, keys)
    needles = [
        f"The pass key of {o} is {v}. Remember it. {v} is the pass key of {o}." if o else
        f"The pass key is {v}. Remember it. {v} is the pass key." for o, v in zip(owners, values)
    ]  # fmt: skip
    turns = [
        Turn(f"What is the pass key of {o}? The pass key of {o} is", f" {v}.") if o else
        Turn("What is the pass key? The pass key is", f" {v}.") for o, v in zip(owners, values)
    ]  # fmt: skip
    room = tokens - 8 - size("\n".join([PASSKEY_HEAD, *needles, turns[0].question]))
    filler = fill(source, room, size, quest=depth is not None or rng.random() < 0.4)
    for needle in needles:
        place = round(depth * len(filler)) if depth is not None else rng.randint(0, len(filler))
        filler.insert(place, needle)
    rng.shuffle(turns)
    return Document("passkey", "\n".join([PASSKEY_HEAD, *filler]), turns, chat=False)


def fill(source: Source, room: int, size: Size, *, quest: bool = False) -> list[str]:
    """Lines without needles of about `room` tokens, never more: Quest's grass, or sentences with other numbers in them."""
    rng = source.rng
    lines: list[str] = []
    while True:
        line = GRASS if quest else _distraction(source)
        room -= size(line) + 1
        if room < 0:
            return lines
        lines.append(line)
        if not quest and rng.random() < 0.3:
            quest = rng.random() < 0.5


def _distraction(source: Source) -> str:
    rng = source.rng
    if rng.random() < 0.35:
        what = rng.choice(
            ("bus number", "door code", "price of the ticket", "number of the house", "year of the map")
        )
        return f"The {what} is {source.number(rng.choice((3, 4, 5, 5)))}."
    if rng.random() < 0.5:
        return GRASS
    return " ".join(rng.sample(AIR, 3))


def lines(source: Source, tokens: int, size: Size, *, asked: int = 1, brief: bool = False) -> Document:
    """LongChat's line retrieval: 'line <name>: REGISTER_CONTENT is <number>'; `brief`: with fewer words around it."""
    rng = source.rng
    head, end = ("Remember these lines.", "") if brief else (LINES_HEAD, "\nNow the record is over.")
    room, record = tokens - size(head + end) - (12 if brief else 44), {}
    while True:
        name = source.pair()
        value = source.number(5 if rng.random() < 0.8 else 4)
        if name in record:
            continue
        room -= size(_line(name, value))
        if room < 0:
            break
        record[name] = value
    names = rng.sample(list(record), min(asked, len(record)))
    form = LINES_SHORT if brief else (LINES_QUESTION,)
    turns = [Turn(rng.choice(form).format(n), _line(n, record[n]).strip()) for n in names]
    context = head + "".join(_line(n, v) for n, v in record.items()) + end
    return Document("lines", context, turns, prose=0.02)


def _line(name: str, value: str) -> str:
    return f"\nline {name}: REGISTER_CONTENT is <{value}>"


def table(source: Source, tokens: int, size: Size, *, asked: int = 1) -> Document:
    """Short keys and values in one of several forms: the simplest look-up."""
    rng = source.rng
    pools: list[Callable[[], str]] = [
        source.name,
        source.pair,
        lambda: source.number(rng.choice((1, 2, 3))),
        lambda: rng.choice(words.THINGS),
        lambda: words.made_up(rng),
    ]
    key, value = rng.sample(pools, 2)
    if rng.random() < 0.3:
        value = lambda: source.number(rng.choice((2, 3, 4, 5)))  # noqa: E731
    form = rng.choice(
        ("{0}: {1}", "{0} = {1}", "{0} -> {1}", "{0} is {1}.", "The number of {0} is {1}.", "{0} {1}")
    )
    cell = rng.choice(("\n", "\n", ", ", "; "))
    room = tokens - 8
    pairs: dict[str, str] = {}
    while True:
        entry = key(), value()
        room -= size(form.format(*entry)) + 1
        if room < 0 or (entry[0] in pairs and rng.random() < 0.1):
            break
        pairs.setdefault(*entry)
    chosen = rng.sample(list(pairs), min(asked, len(pairs)))
    if form.startswith("-") and rng.random() < 0.5:  # asked by repeating the beginning of the entry
        head = form.split("{1}")[0].rstrip()
        tail = form[len(head) :].format("", "{0}") if "{0}" not in head else form[len(head) :]
        turns = [Turn(head.format(k), tail.format(k, pairs[k])) for k in chosen]
        return Document("table", cell.join(form.format(k, v) for k, v in pairs.items()), turns, False, 0.02)
    turns = [Turn(f"What belongs to {k}?", form.removeprefix("- ").format(k, pairs[k])) for k in chosen]
    return Document("table", cell.join(form.format(k, v) for k, v in pairs.items()), turns, True, 0.02)


def story_questions(source: Source, tokens: int, size: Size, *, asked: int = 1) -> Document:
    """Questions about the facts of a story of at most `tokens` tokens."""
    chatter = source.rng.choice((0.2, 0.5, 1.0))
    facts = max(1, int(tokens / (11 * (1 + chatter))))
    while True:
        made = story(source, facts, chatter)
        if size(made.text) <= tokens - 40 or facts == 1:
            break
        facts = int(facts * 0.9)
    turns = source.rng.sample(made.turns, min(asked, len(made.turns)))
    return Document("story", made.text, turns, prose=0.25, told=made.told)


def index(source: Source, tokens: int, size: Size, *, asked: int = 1) -> Document:
    """Sentences about things, then who and what belongs to each: for training only."""
    made = story_index(source, max(2, tokens // 15))
    return Document("index", made.text, made.turns[:asked], chat=False, prose=0.05, told=made.told)


def needles(source: Source, tokens: int, size: Size, *, asked: int = 1) -> Document:
    """Facts of a story, a few, each in a line of its own, somewhere in filler."""
    made = story(source, 2 + source.rng.randint(0, 4), 0.0)
    sentences = made.text.replace("\n", " ").replace(". ", ".\n").split("\n")
    filler = fill(source, tokens - size(made.text) - 60, size, quest=source.rng.random() < 0.5)
    for sentence in sentences:
        filler.insert(source.rng.randint(0, len(filler)), f"Note: {sentence}")
    turns = source.rng.sample(made.turns, min(asked, len(made.turns)))
    return Document("needles", "\n".join(filler), turns, prose=0.02, told=made.told)


def count(source: Source, tokens: int, size: Size, *, asked: int = 1) -> Document:
    """How often a thing is named in a short list, and which of two numbers is larger."""
    rng = source.rng
    things = rng.sample(words.THINGS, rng.randint(2, 4))
    shelf = rng.choices(things, k=rng.randint(3, 9))
    people = source.several(source.name, rng.randint(2, 4))
    has = dict(zip(people, rng.sample(range(2, 100), len(people))))
    text = (
        "On the shelf: "
        + ", ".join(shelf)
        + ". "
        + " ".join(f"{p} had {n} {words.FOODS[0]}." for p, n in has.items())
    )
    turns = [Turn(f"How many times is {t} on the shelf?", f"{t}: {shelf.count(t)}") for t in things]
    for first, second in [rng.sample(people, 2) for _ in range(asked)]:
        more = max(first, second, key=has.__getitem__)
        turns.append(Turn(f"Who had more, {first} or {second}?", f"{more} had more."))
    turns = list(dict.fromkeys(turns))
    return Document("count", text, rng.sample(turns, min(asked, len(turns))))


GROUPS: dict[str, tuple[str, ...]] = {
    "animal": words.ANIMALS, "food": words.FOODS, "place": words.PLACES, "work": words.ROLES,
    "colour": words.COLOURS, "thing": words.THINGS,
}  # fmt: skip


def classify(source: Source, tokens: int, size: Size, *, asked: int = 1) -> Document:
    """Few-shot classification: words with the name of their group, sometimes a name made up for the occasion."""
    rng = source.rng
    groups = rng.sample(list(GROUPS), rng.randint(2, 4))
    made_up = rng.random() < 0.5
    labels = {g: words.made_up(rng) if made_up else g for g in groups}
    room, shots, seen = tokens - 16, [], set()
    pool = [(word, g) for g in groups for word in GROUPS[g]]
    rng.shuffle(pool)
    asked_of = [(w, g) for w, g in pool[:asked]]
    for word, group in pool[asked:]:
        line = f"{word} -> {labels[group]}"
        room -= size(line) + 1
        if room < 0:
            break
        shots.append(line)
        seen.add(group)
    turns = [Turn(f"{w} ->", f" {labels[g]}") for w, g in asked_of if g in seen]
    return Document("classify", "\n".join(["Give each word its group.", *shots]), turns, chat=False)


def plain(source: Source, tokens: int, size: Size, *, asked: int = 0) -> Document:
    """A story and nothing else: for its language."""
    made = story(source, max(2, tokens // 22), 1.0)
    return Document("plain", made.text, [], chat=False, prose=0.4, told=made.told)


Task = Literal["passkey", "lines", "table", "story", "needles", "count", "classify", "plain"]
MAKERS: dict[str, Callable[..., Document]] = {
    "lines": lines, "table": table, "story": story_questions, "needles": needles, "count": count,
    "classify": classify, "plain": plain, "index": index,
}  # fmt: skip


def make(task: str, source: Source, tokens: int, size: Size, asked: int) -> Document:
    """A document of at most about `tokens` tokens with up to `asked` questions, for training."""
    if task == "passkey":
        most = max(1, min(asked, tokens // 80))
        keys = 1 if source.rng.random() < 0.4 else source.rng.randint(1, most)
        return passkey(source, tokens, size, keys=keys)
    if task == "lines":
        return lines(source, tokens, size, asked=asked, brief=tokens < 256 or source.rng.random() < 0.6)
    return MAKERS[task](source, tokens, size, asked=asked)


def sample(seed: int, task: str, tokens: int = 300) -> Document:
    """One document, sized by characters; for a look."""
    return make(task, Source(random.Random(seed)), tokens, lambda text: len(text) // 4, 4)
