"""The batch command around the engine: rows a second and memory with a model that takes no time; what the journal costs."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bench.batch_stub import QUARTERS
from bench.result import ROOT, Result
from jaxinfer import LLM, Completion, Request
from jaxinfer.batch.cli import main
from jaxinfer.batch.journal import Journal
from jaxinfer.demo import make_batch

ROWS, OTHER_ROWS = 1_000_000, 100_000


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench batch")
    parser.add_argument("--rows", type=int, default=50_000 if quick else ROWS)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs with the journal and without")
    parser.add_argument("--copies", type=int, default=1, help="of the demo's rows in such a run")
    known = parser.parse_args(options)
    result = Result("batch", vars(known) | {"quick": quick})
    for kind in ("text", "ids", "chat"):
        rows = known.rows if kind == "text" else min(known.rows, OTHER_ROWS)
        result.rows.append(flow(kind, rows))
    text, ids, chat = result.rows
    ratios, shares = journal_cost(known.repeats, known.copies)
    for name, values in (("journal_over_discard", ratios), ("journal_share", shares)):
        result.rows.append({"kind": name} | {f"pair_{i}": value for i, value in enumerate(values, 1)})
    result.summary = {
        "rows_per_s": text["rows_per_s"],
        "planning_rows_per_s": text["planning_rows_per_s"],
        "planning_rows_per_cpu_s": text["planning_rows_per_cpu_s"],
        "planning_rows_per_s_ids": ids["planning_rows_per_s"],
        "planning_rows_per_s_chat": chat["planning_rows_per_s"],
        "resuming_rows_per_s": text["resuming_rows_per_s"],
        "peak_rss_bytes": text["peak_rss_bytes"],
        "rss_growth_bytes_per_row": text["rss_growth_bytes_per_row"],
        "rows_in_2_gib": (2**31 - text["rss_at_start_bytes"]) / text["rss_growth_bytes_per_row"],
        "journal_over_discard": statistics.median(ratios),
        "journal_share": statistics.median(shares),
    }
    return result


def flow(kind: str, rows: int) -> dict[str, Any]:
    """One run of the stub in a process of its own, whose memory is all the run's."""
    with tempfile.TemporaryDirectory(prefix="jaxinfer-bench-") as folder:
        files = [f"{folder}/in.jsonl", f"{folder}/out.jsonl"]
        command = [sys.executable, "-m", "bench.batch_stub", kind, str(rows), *files]
        done = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    row = {
        "kind": kind,
        "rows": rows,
        "rows_per_s": rows / done["seconds"],
        "planning_rows_per_s": rows / done["planning_s"],
        "planning_rows_per_cpu_s": rows / done["planning_cpu_s"],
        "resuming_rows_per_s": rows / done["again_s"],
        "rss_at_start_bytes": done["rss_at_start"],
    }
    for part in ("reading", "serving"):
        row |= {f"rss_{part}_{share}": done[part][str(share)] for share in QUARTERS}
    return row | {
        "peak_rss_bytes": done["peak_rss"],
        "peak_rss_resuming_bytes": done["peak_rss_again"],
        "rss_growth_bytes_per_row": (done["peak_rss"] - done["rss_at_start"]) / rows,
    }


def journal_cost(repeats: int, copies: int) -> tuple[list[float], list[float]]:
    """Of each pair of runs on the embedded model, one with the journal and one whose rows go nowhere, in turn:

    Returns:
      throughput of the one over that of the other, which takes a quiet machine;
      and the share of its time that the one spends in the journal's own calls, which does not.
    """
    timed = Timed(LLM())
    with tempfile.TemporaryDirectory(prefix="jaxinfer-bench-") as folder:
        source = Path(folder) / "in.jsonl"
        source.write_text("".join(line + "\n" for line in demo_lines(copies)))
        timed.run(source, Kept())  # compiles what the batch needs
        ratios, shares = [], []
        for index in range(repeats):
            kept = Kept()
            first, second = (kept, Discarded()) if index % 2 else (Discarded(), kept)
            taken = [timed.run(source, first), timed.run(source, second)]
            seconds, other = reversed(taken) if first is not kept else taken
            ratios.append(other / seconds)
            shares.append(kept.seconds / seconds)
    return ratios, shares


class Kept:
    """The journal as it is.

    Attributes:
      seconds: that its callers wait for it, and that its own thread works.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def patches(self) -> Iterator[Any]:
        for name, clock in (
            ("append", time.perf_counter),
            ("close", time.perf_counter),
            ("_write", time.thread_time),
        ):
            yield mock.patch.object(Journal, name, self._watched(getattr(Journal, name), clock))

    def _watched(self, method: Callable[..., None], clock: Callable[[], float]) -> Callable[..., None]:
        def watched(*arguments: Any) -> None:
            start = clock()
            try:
                method(*arguments)
            finally:
                self.seconds += clock() - start

        return watched


class Discarded:
    """A journal that forgets every row."""

    def patches(self) -> Iterator[Any]:
        yield mock.patch.object(Journal, "append", lambda journal, line: None)


def demo_lines(copies: int) -> Iterator[str]:
    """The demo's good rows, several times over."""
    for copy in range(copies):
        for line in make_batch().lines:
            if '"bad-' not in line:
                yield line.replace('"custom_id": "', f'"custom_id": "{copy}-', 1)


class Timed:
    """A model whose runs are timed from the first request to the closed output; reading the input is not in it."""

    def __init__(self, llm: LLM):
        self._llm = llm
        self._started = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        self._started = time.perf_counter()
        return self._llm.stream(requests)

    def run(self, source: Path, journal: Kept | Discarded) -> float:
        """Seconds to answer all rows from an empty prefix cache."""
        self._llm.engine.forget_prefixes()
        command = ["-i", str(source), "-o", str(source.with_name("out.jsonl")), "--overwrite", "--quiet"]
        with contextlib.ExitStack() as patched:
            for patch in journal.patches():
                patched.enter_context(patch)
            status = main(command, load_model=lambda settings: self)
        assert status == 0
        return time.perf_counter() - self._started
