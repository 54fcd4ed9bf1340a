"""`python -m jaxinfer.demo`: about 200 requests through the batch command, on the embedded model, checked against the right answers."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxinfer.batch import cli
from jaxinfer.batch.rows import CHAT_URL, COMPLETIONS_URL
from jaxinfer.demo_tasks import ARROW, HEADER, TASKS, Item, items

SHOTS = 6  # examples before the question in a group's common prefix
CHATS, COMPLETIONS, LONG = 10, 16, 12  # rows of each task; the last: long answers, of one task
LONG_TASK = "count"
SHORT_ANSWER = 45  # characters, at most
LONG_ANSWER = (120, 240)  # characters, least and most
PASS = 0.85  # least share of right answers; assets/README.md says what the model reaches
PASS_LONG = 0.6  # of the task with long answers: one wrong number of fifty makes an answer wrong

_INTRODUCTION = """[bold]jaxinfer demo[/bold]: a batch file through [bold]jaxinfer-batch[/bold], every answer checked.
The model is the embedded one: half a million parameters, trained in minutes by
bench/demo_model.py on seven small text tasks and nothing else. Its training left out the
questions asked here. Three rows are wrong on purpose.
"""


@dataclass
class Batch:
    """A batch file to be: its lines, and what should come out.

    Attributes:
      expected: by custom_id, of rows that have an answer.
      broken: the error code of each row that is wrong on purpose, by custom_id ("" for a row without one).
    """

    lines: list[str] = field(default_factory=list)
    expected: dict[str, Item] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def add(self, url: str, body: dict[str, Any], item: Item) -> None:
        custom_id = f"{item.task}-{len(self.lines)}"
        self.expected[custom_id] = item
        self.lines.append(_row(custom_id, url, body))


def make_batch(seed: int = 0) -> Batch:
    """Rows of all tasks in random order, the same for the same seed."""
    batch, rng = Batch(), random.Random(seed)
    rows = [row for task in TASKS for row in _task_rows(task, rng)]
    rng.shuffle(rows)
    for row in rows:
        batch.add(*row)
    _break(batch)
    return batch


def _task_rows(task: str, rng: random.Random) -> Iterator[tuple[str, dict[str, Any], Item]]:
    """Chats without examples, completions behind the same examples, and completions with long answers."""
    for item in _questions(task, rng, CHATS):
        messages = [{"role": "system", "content": HEADER}, {"role": "user", "content": item.question}]
        yield CHAT_URL, {"messages": messages, "max_tokens": 40, "temperature": 0}, item
    examples = _questions(task, rng, SHOTS, unseen=False)
    prefix = HEADER + "\n" + "".join(item.line for item in examples)
    for item in _questions(task, rng, COMPLETIONS):
        body = {"prompt": prefix + item.question + ARROW, "max_tokens": 40, "temperature": 0}
        yield COMPLETIONS_URL, body, item
    if task == LONG_TASK:
        for item in _questions(task, rng, LONG, length=LONG_ANSWER):
            body = {"prompt": item.question + ARROW, "max_tokens": 200, "temperature": 0}
            yield COMPLETIONS_URL, body, item


def _questions(
    task: str,
    rng: random.Random,
    count: int,
    *,
    unseen: bool = True,
    length: tuple[int, int] = (0, SHORT_ANSWER),
) -> list[Item]:
    """Items whose answer is of this length, least and most characters."""
    low, high = length
    fitting = (item for item in items(task, rng, unseen=unseen) if low <= len(item.answer) <= high)
    return list(itertools.islice(fitting, count))


def _break(batch: Batch) -> None:
    """Puts rows that cannot be answered among the others: each should become an error row and harm nobody else."""
    too_long = {"prompt": "sort: " + "1 " * 2000 + ARROW, "max_tokens": 8}
    wrong_type = {"prompt": f"sort: 2 1{ARROW}", "temperature": "hot"}
    bad = (
        ("bad-length", _row("bad-length", COMPLETIONS_URL, too_long), "context_length_exceeded"),
        ("bad-temperature", _row("bad-temperature", COMPLETIONS_URL, wrong_type), "invalid_type"),
        ("", '{"custom_id": "bad-torn", "method": "POST", "url"', "invalid_json"),
    )
    for place, (custom_id, line, code) in enumerate(bad, start=1):
        batch.lines.insert(place * len(batch.lines) // 4, line)
        batch.broken[custom_id] = code


def _row(custom_id: str, url: str, body: dict[str, Any]) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def _answer(row: dict[str, Any]) -> str:
    choice = row["response"]["body"]["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def _is_right(row: dict[str, Any] | None, item: Item) -> bool:
    return row is not None and not row["error"] and _answer(row).strip() == item.answer


def check(batch: Batch, rows: list[dict[str, Any]], console: Console) -> list[str]:
    """Prints what became of the rows; returns what is not as it should be, in words."""
    by_id = {row["custom_id"] or "": row for row in rows}
    problems = []
    if missing := len(batch.lines) - len(rows):
        problems.append(f"{abs(missing)} rows are {'missing' if missing > 0 else 'too many'}")
    table = Table("task", "right", "of", "share", "an answer of the model")
    for task in TASKS:
        wanted = {key: item for key, item in batch.expected.items() if item.task == task}
        right = sum(_is_right(by_id.get(key), item) for key, item in wanted.items())
        share = right / len(wanted)
        least = PASS_LONG if task == LONG_TASK else PASS
        if share < least:
            problems.append(f"{task}: {share:.0%} right, less than {least:.0%}")
        table.add_row(task, str(right), str(len(wanted)), f"{share:.0%}", _example(wanted, by_id))
    console.print(table)
    return problems + _check_errors(batch, by_id, console)


def _example(wanted: dict[str, Item], by_id: dict[str, dict[str, Any]]) -> str:
    key, item = min(wanted.items(), key=lambda pair: len(pair[1].line))
    row = by_id.get(key)
    return f"{item.question}{ARROW} {_answer(row).strip()}" if row and not row["error"] else ""


def _check_errors(batch: Batch, by_id: dict[str, dict[str, Any]], console: Console) -> list[str]:
    problems = []
    console.print("error rows:")
    for custom_id, row in by_id.items():
        if error := row["error"]:
            said = f"  {error['code']}: {error['message']}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
            if batch.broken.get(custom_id) != error["code"]:
                problems.append(f"{custom_id or 'a row without an id'}: unexpected error {error['code']}")
    answered = [key or "the torn row" for key in batch.broken if not by_id.get(key, {}).get("error")]
    return problems + [f"{key}: should be an error row" for key in answered]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 if all is as it should be."""
    parser = argparse.ArgumentParser(prog="python -m jaxinfer.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="for the files of the run")
    folder: Path = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(_INTRODUCTION, highlight=False, soft_wrap=True)
    batch = make_batch()
    asked, answered, metrics = (folder / n for n in ("requests.jsonl", "answers.jsonl", "metrics.json"))
    asked.write_text("".join(line + "\n" for line in batch.lines))
    command = ["-i", asked, "-o", answered, "--overwrite", "--metrics", metrics]
    command += ["--report", folder / "report.html"]
    console.print("$ jaxinfer-batch " + " ".join(map(str, command)), highlight=False, soft_wrap=True)
    start = time.perf_counter()
    status = cli.main([str(word) for word in command])
    seconds = time.perf_counter() - start
    if status != cli.SOME_ERRORS:
        console.print(f"[red]jaxinfer-batch ended with status {status}, not with {cli.SOME_ERRORS}")
        return 1
    rows = [json.loads(line) for line in answered.read_text().splitlines()]
    problems = check(batch, rows, console)
    _print_speed(json.loads(metrics.read_text()), seconds, folder, console)
    for problem in problems:
        console.print(f"[red]{problem}")
    return 1 if problems else 0


def _print_speed(metrics: dict[str, float], seconds: float, folder: Path, console: Console) -> None:
    console.print(
        f"{metrics['rows']:.0f} rows in {seconds:.1f} s, loading and compiling included; "
        f"{metrics['tokens_per_s']:,.0f} tokens/s while answering, "
        f"{metrics['cached_share']:.0%} of the prompt tokens taken from the prefix cache\n"
        f"the files are in {folder}; report.html shows the run over time",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
