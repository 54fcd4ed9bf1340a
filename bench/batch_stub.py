"""One batch run whose model takes no time, in a process of its own: python -m bench.batch_stub KIND ROWS INPUT OUTPUT.

Prints one JSON object: the seconds of each part and the memory along the way.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxinfer.batch.cli import ALL_ANSWERED, main
from jaxinfer.batch.rows import CHAT_URL, COMPLETIONS_URL
from jaxinfer.core import Choice, Completion, FinishReason, Request, Usage
from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models.tokenizer import Tokenizer

QUARTERS = (25, 50, 75, 100)
_CONTEXT = 1024
_ANSWER = Choice(text=" 1 2 3", token_ids=(5, 6, 7), finish_reason=FinishReason.STOP)
_PAGE = os.sysconf("SC_PAGE_SIZE")


def body(kind: str, number: int) -> dict[str, Any]:
    """A short prompt, unlike any other: `kind` is "text", "ids" or "chat"."""
    text = f"sort: {number % 10} {number // 10} 3 ->"
    if kind == "ids":
        return {"prompt": [1, *(3 + int(digit) for digit in str(number)), 9], "max_tokens": 8}
    if kind == "chat":
        return {"messages": [{"role": "user", "content": text}], "max_tokens": 8}
    return {"prompt": text, "max_tokens": 8}


def write_input(path: Path, kind: str, rows: int) -> None:
    url = CHAT_URL if kind == "chat" else COMPLETIONS_URL
    with path.open("w") as file:
        for number in range(rows):
            row = {"custom_id": f"row-{number}", "method": "POST", "url": url, "body": body(kind, number)}
            file.write(json.dumps(row) + "\n")


class Memory:
    """Resident bytes at each quarter of the rows."""

    def __init__(self, rows: int):
        self._rows, self._count = rows, 0
        self.quarters: dict[int, int] = {}

    def count(self) -> None:
        self._count += 1
        for share in QUARTERS:
            if self._count == self._rows * share // 100:
                self.quarters[share] = resident()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def most_resident() -> int:
    """The system's own count, which lags behind by some pages."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stub:
    """Answers at once. Times how long it waits for requests, and watches the memory.

    Attributes:
      reading, serving: memory while rows are checked, and while they are answered.
      planning: seconds until the first request is there, and between requests; planning_cpu: of the processor.
    """

    model_name, model_fingerprint = "stub", "stub"

    def __init__(self, rows: int):
        self.tokenizer = Tokenizer(EMBEDDED_MODEL)
        self.reading, self.serving = Memory(rows), Memory(rows)
        self.at_start = resident()
        self.planning = self.planning_cpu = 0.0
        self._created = now()

    def token_limit(self, request: Request) -> int:
        self.reading.count()
        room = _CONTEXT - len(request.prompt_ids)
        return len(request.prompt_ids) + min(request.sampling.max_tokens or room, room)

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        source = iter(requests)
        self._plan_since(self._created)
        while True:
            start = now()
            request = next(source, None)
            self._plan_since(start)
            if request is None:
                return
            self.serving.count()
            usage = Usage(prompt_tokens=len(request.prompt_ids), completion_tokens=3)
            yield Completion(request_id=request.id, choices=(_ANSWER,), usage=usage)

    def _plan_since(self, start: tuple[float, float]) -> None:
        clock, processor = now()
        self.planning += clock - start[0]
        self.planning_cpu += processor - start[1]

    def metrics(self) -> dict[str, float]:
        return {}


def now() -> tuple[float, float]:
    """Seconds of the clock, and of the processor; others who use the machine disturb those less."""
    return time.perf_counter(), time.process_time()


def measure(rows: int, source: str, output: str) -> dict[str, Any]:
    """Answers all rows, then runs the same command again on the finished output."""
    stub = Stub(rows)
    command = ["-i", source, "-o", output, "--quiet"]
    seconds = _run(command, stub)
    peak = max(most_resident(), *stub.reading.quarters.values(), *stub.serving.quarters.values())
    again = _run(command, Stub(rows))
    return {
        "seconds": seconds,
        "planning_s": stub.planning,
        "planning_cpu_s": stub.planning_cpu,
        "again_s": again,
        "rss_at_start": stub.at_start,
        "peak_rss": peak,
        "peak_rss_again": max(peak, most_resident()),
        "reading": stub.reading.quarters,
        "serving": stub.serving.quarters,
    }


def _run(command: list[str], stub: Stub) -> float:
    start = time.perf_counter()
    status = main(command, load_model=lambda settings: stub)
    assert status == ALL_ANSWERED
    return time.perf_counter() - start


if __name__ == "__main__":
    kind, rows, source, output = sys.argv[1:]
    write_input(Path(source), kind, int(rows))
    print(json.dumps(measure(int(rows), source, output)))
