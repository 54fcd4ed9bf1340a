"""`python -m jaxinfer.demo`: about 200 requests through the batch command, on the embedded model, checked against the right answers."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxinfer.batch import cli
from jaxinfer.batch.rows import COMPLETIONS_URL

ROWS = Path(__file__).parent / "assets" / "demo"  # written by `python -m bench.pocket.requests`
PASS = {  # least share right
    "passkey": 0.95,
    "lines": 0.9,
    "classify": 0.95,
    "needles": 0.85,
    "story": 0.9,
    "table": 0.7,
}
TOLD = 20  # characters of a story told on, at least

_INTRODUCTION = """[bold]jaxinfer demo[/bold]: a batch file through [bold]jaxinfer-batch[/bold], every answer checked.
The model is the embedded one, a small mixture of experts that this project trained
(bench/pocket) to read and look things up in a tiny world: pass keys in up to 8,192 tokens of
filler, lines of a record, facts of a story, groups of words. Its training never saw the names
and numbers asked for here. Three rows are wrong on purpose.
"""


@dataclass(frozen=True)
class Expected:
    """What a row should be answered with; None for a story to be told on, which has no one right answer."""

    task: str
    answer: str | None

    def is_right(self, text: str) -> bool:
        if self.answer is None:
            return len(text.strip()) >= TOLD
        if self.task in ("passkey", "lines"):  # Quest takes the first number, LongChat the last
            which = slice(1) if self.task == "passkey" else slice(-1, None)
            return re.findall(r"\d+", text)[which] == re.findall(r"\d+", self.answer)
        return text.strip() == self.answer.strip()


@dataclass
class Batch:
    """A batch file to be: its lines, and what should come out.

    Attributes:
      expected: by custom_id, of rows that have an answer.
      broken: the error code of each row that is wrong on purpose, by custom_id ("" for a row without one).
    """

    lines: list[str] = field(default_factory=list)
    expected: dict[str, Expected] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return sorted({item.task for item in self.expected.values()})


def make_batch() -> Batch:
    """The rows that come with the package, and three bad ones."""
    expected = json.loads((ROWS / "answers.json").read_text())
    batch = Batch((ROWS / "requests.jsonl").read_text().splitlines())
    batch.expected = {key: Expected(**item) for key, item in expected.items()}
    _break(batch)
    return batch


def _break(batch: Batch) -> None:
    """Puts rows that cannot be answered among the others: each should become an error row and harm nobody else."""
    too_long = {"prompt": "Here we go. " * 4000, "max_tokens": 8}
    wrong_type = {"prompt": "Once upon a time", "temperature": "hot"}
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


def _is_right(row: dict[str, Any] | None, item: Expected) -> bool:
    return row is not None and not row["error"] and item.is_right(_answer(row))


def check(batch: Batch, rows: list[dict[str, Any]], console: Console) -> list[str]:
    """Prints what became of the rows; returns what is not as it should be, in words."""
    by_id = {row["custom_id"] or "": row for row in rows}
    problems = []
    if missing := len(batch.lines) - len(rows):
        problems.append(f"{abs(missing)} rows are {'missing' if missing > 0 else 'too many'}")
    table = Table("task", "right", "of", "share", "an answer of the model")
    for task in batch.tasks:
        wanted = {key: item for key, item in batch.expected.items() if item.task == task}
        right = sum(_is_right(by_id.get(key), item) for key, item in wanted.items())
        share = right / len(wanted)
        least = PASS.get(task, 1.0)
        if share < least:
            problems.append(f"{task}: {share:.0%} right, less than {least:.0%}")
        table.add_row(task, str(right), str(len(wanted)), f"{share:.0%}", _example(wanted, by_id))
    console.print(table)
    return problems + _check_errors(batch, by_id, console)


def _example(wanted: dict[str, Expected], by_id: dict[str, dict[str, Any]]) -> str:
    """The first answer of the model, in one line of at most 60 characters."""
    row = by_id.get(min(wanted))
    text = " ".join(_answer(row).split()) if row and not row["error"] else ""
    return text if len(text) <= 60 else text[:57] + "..."


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
