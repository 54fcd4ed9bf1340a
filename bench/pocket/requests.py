"""Writes the demo's batch, requests and right answers: `python -m bench.pocket.requests`; the same rows every time."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.pocket import tasks
from bench.pocket.items import items
from bench.pocket.tasks import Document, Size
from bench.pocket.words import Source
from jaxinfer.batch.rows import CHAT_URL, COMPLETIONS_URL
from jaxinfer.llm import EMBEDDED_MODEL

LONG = (
    ("passkey", 2048, 10),
    ("passkey", 4096, 4),
    ("passkey", 8192, 2),
    ("lines", 512, 12),
    ("lines", 2048, 4),
)
SHORT = (("needles", 512, 16), ("table", 512, 16))
GROUPS = (("story", 8, 7), ("classify", 6, 8))  # contexts, and questions on each: they share a prefix
CONTINUED, CONTINUATION = 12, 200  # stories told on, tokens of each
ANSWER = 48  # tokens, at most
Row = tuple[str, str, dict[str, Any], str | None]  # task, url, body, right answer


def rows(size: Size) -> list[Row]:
    """About 200 requests in random order, from names and values that training never saw."""
    made = [*_single(size), *_groups(size), *_continued(size)]
    random.Random("demo").shuffle(made)
    return made


def _single(size: Size) -> Iterator[Row]:
    for task, tokens, count in (*LONG, *SHORT):
        for item in items(task, tokens, size, count):
            yield task, *_request(item.prompt, item.chat), item.answer


def _groups(size: Size) -> Iterator[Row]:
    for task, contexts, questions in GROUPS:
        for index in range(contexts):
            source = Source(random.Random(f"demo {task} {index}"), unseen=True)
            document = tasks.make(task, source, 400, size, questions)
            for turn in document.turns:
                yield task, *_request(f"{document.context}\n{turn.question}", document.chat), turn.answer


def _continued(size: Size) -> Iterator[Row]:
    for index in range(CONTINUED):
        document: Document = tasks.plain(Source(random.Random(f"demo plain {index}"), unseen=True), 200, size)
        told = {"temperature": 0.8, "seed": index}
        begun = document.context[: document.context.index(".", 120) + 1]
        yield "tell", COMPLETIONS_URL, {"prompt": begun, "max_tokens": CONTINUATION} | told, None


def _request(prompt: str, chat: bool) -> tuple[str, dict[str, Any]]:
    short = {"max_tokens": ANSWER, "temperature": 0}
    if chat:
        return CHAT_URL, {"messages": [{"role": "user", "content": prompt}]} | short
    return COMPLETIONS_URL, {"prompt": prompt, "stop": ["\n"]} | short


def write(folder: Path, size: Size) -> int:
    """folder/requests.jsonl and folder/answers.json (task and right answer by custom_id); the number of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, answers = [], {}
    for index, (task, url, body, answer) in enumerate(rows(size)):
        name = f"{task}-{index}"
        lines.append(json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) + "\n")
        answers[name] = {"task": task, "answer": answer}
    (folder / "requests.jsonl").write_text("".join(lines))
    (folder / "answers.json").write_text(json.dumps(answers, indent=0) + "\n")
    return len(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pocket.requests", description=__doc__)
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL.parent / "demo")
    parser.add_argument("--tokenizer", type=Path, default=EMBEDDED_MODEL / "tokenizer.json")
    options = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    count = write(options.out, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    print(f"{count} rows in {options.out}")


if __name__ == "__main__":
    main()
