"""Writes a small batch file of one kind: `python -m examples.make few-shot | jaxinfer-batch -i - -o answers.jsonl`.

Prompts are sized in tokens of the model that will answer them, so that the same kinds of rows suit every model.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models.checkpoint import read_manifest
from jaxinfer.models.tokenizer import Tokenizer

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ANSWER = 48  # tokens kept free for an answer where prompts fill the context
GROUPS = {
    "animal": "horse cow sheep goat duck goose mouse rabbit fox wolf bear lion frog snake bee spider",
    "food": "bread cheese apple pear soup rice butter honey cake salt onion carrot plum nut egg milk",
    "colour": "red blue green yellow black white brown grey pink purple orange violet gold silver",
    "tool": "hammer saw knife spoon needle rope ladder brush shovel pump lamp broom wheel axe nail",
}
THINGS = ("cup", "key", "book", "hat", "coin", "pen", "ring", "ball")
PEOPLE = ("Anna", "Tom", "Mia", "Ben", "Lena", "Paul", "Eva", "Max")
OPENINGS = ("Once upon a time", "In the morning", "In the old house", "After dark", "On the way home")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@dataclass(frozen=True)
class Model:
    """What a row's length is measured with.

    Attributes:
      tokens: longest prompt to write.
    """

    tokenizer: Tokenizer
    tokens: int

    def size(self, text: str) -> int:
        return len(self.tokenizer.encode(text))


Body = tuple[str, dict[str, Any]]


def chat(model: Model, rng: random.Random) -> Iterator[Body]:
    """Short conversations with a question on a list; every third one has an earlier turn."""
    for number in range(sys.maxsize):
        shelf = rng.choices(rng.sample(THINGS, 3), k=rng.randint(3, 7))
        first, second = rng.sample(THINGS, 2)
        asked = "How many times is {} on the shelf?"
        messages = [{"role": "user", "content": f"On the shelf: {', '.join(shelf)}.\n{asked.format(first)}"}]
        if number % 3 == 2:
            said = f"{first}: {shelf.count(first)}"
            messages.append({"role": "assistant", "content": said})
            messages.append({"role": "user", "content": asked.format(second)})
        yield CHAT, {"messages": messages, "max_tokens": 24, "temperature": 0}


def completion(model: Model, rng: random.Random) -> Iterator[Body]:
    """Texts to go on with: one sampled continuation, or three different ones of a seed."""
    for number in range(sys.maxsize):
        prompt = f"{rng.choice(OPENINGS)}, {rng.choice(PEOPLE)} found a {rng.choice(THINGS)}."
        length = {"min_tokens": 24, "max_tokens": rng.choice((32, 96))}
        draw = {"temperature": 0.8, "top_p": 0.95, "seed": number, "n": 3 if number % 4 == 3 else 1}
        yield COMPLETION, {"prompt": prompt} | length | draw


def few_shot(model: Model, rng: random.Random) -> Iterator[Body]:
    """The same examples before every question: their keys are computed once for all rows."""
    pairs = [(word, group) for group, words in GROUPS.items() for word in words.split()]
    rng.shuffle(pairs)
    prefix, left = "Give each word its group.\n", len(pairs) // 2
    while left and model.size(prefix) < min(model.tokens - 40, 400):
        prefix, left = prefix + "{} -> {}\n".format(*pairs.pop()), left - 1
    while True:
        question = f"{rng.choice(pairs)[0]} ->"
        body = {"prompt": prefix + question, "max_tokens": 8, "temperature": 0, "stop": ["\n"]}
        yield COMPLETION, body


def long_context(model: Model, rng: random.Random) -> Iterator[Body]:
    """A number hidden in filler, in prompts of a quarter of the context up to nearly all of it."""
    head, line = (
        "There is a pass key hidden in this text. Remember it.\n",
        model.size(FILLER * 9) - model.size(FILLER * 8),
    )
    for number in range(sys.maxsize):
        key = rng.randint(10_000, 99_999)
        needle, question = f"The pass key is {key}. Remember it.\n", "What is the pass key? The pass key is"
        room = model.tokens * (number % 4 + 1) // 4 - model.size(head + needle + question) - 2
        lines = max(room // line, 0)
        above = rng.randint(0, lines)
        prompt = head + FILLER * above + needle + FILLER * (lines - above) + question
        yield COMPLETION, {"prompt": prompt, "max_tokens": 8, "temperature": 0}


KINDS: dict[str, tuple[int, Callable[[Model, random.Random], Iterator[Body]]]] = {
    "chat": (96, chat),
    "completion": (48, completion),
    "few-shot": (192, few_shot),
    "long-context": (24, long_context),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.make", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--rows", type=int, help="how many rows")
    parser.add_argument("--tokens", type=int, help="longest prompt; nearly the context if left out")
    parser.add_argument(
        "--model", type=Path, default=EMBEDDED_MODEL, help="folder of the model that will answer"
    )
    given = parser.parse_args(argv)
    most = read_manifest(given.model).config.context_length - ANSWER
    model = Model(Tokenizer(given.model), min(given.tokens or most, most))
    count, kind = KINDS[given.kind]
    for number, (url, body) in zip(range(given.rows or count), kind(model, random.Random(0))):
        row = {"custom_id": f"{given.kind}-{number}", "method": "POST", "url": url, "body": body}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
