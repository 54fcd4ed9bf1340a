"""Runs of the batch command that are ended at a chosen moment, and an account of the work that each of them did."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

WITNESS = str(Path(__file__).with_name("witness.py"))
DEADLINE = 300  # seconds; for a run that hangs


@dataclass(frozen=True)
class Moment:
    """When to end a run.

    Attributes:
      phase: "load", "survey", "first step", "steady" or "end".
      place: within the phase: a share in [0, 1).
      rows: in "steady", as many must be in the output first, and some be left to do; in "end", at most as many must be missing.
    """

    phase: str
    place: float
    rows: int = 0


@dataclass
class Run:
    """One run from start to end.

    Attributes:
      before, after: custom_ids answered in the output.
      tokens: that the device was given, by custom_id.
      done: when each answer was handed over, by custom_id.
      reached: the phase came in which it was to end.
      ended_at: when it was told to end, None if it came to its own end before that.
      spans: seconds from start to model, from model to the first device call.
    """

    status: int
    said: str
    before: set[str]
    after: set[str]
    tokens: Counter
    done: dict[str, float]
    reached: bool
    ended_at: float | None
    spans: tuple[float, float]

    @property
    def lost(self) -> set[str]:
        """Rows that were begun in vain."""
        return self.tokens.keys() - self.after

    @property
    def unfinished(self) -> set[str]:
        return self.tokens.keys() - self.done.keys()

    @property
    def unwritten(self) -> set[str]:
        """Rows that were finished in vain."""
        return self.done.keys() - self.after

    @property
    def oldest_unwritten(self) -> float:
        """For how many seconds the oldest of them had been finished."""
        return max((self.ended_at - self.done[name] for name in self.unwritten), default=0.0)

    @property
    def lost_tokens(self) -> int:
        return sum(self.tokens[name] for name in self.lost)


class Batch:
    """An input and its output, worked on by one run after another.

    Args:
      options: of the command, the same for all runs.
      spans: how long loading and reading take, as `Run.spans`; moments in those phases are drawn from them.
    """

    def __init__(self, folder, source, *options, good, spans=(1.0, 0.2)):
        folder.mkdir()
        self.out = folder / "out.jsonl"
        self._log = folder / "log"
        self._good, self._spans = good, spans
        self._command = [sys.executable, WITNESS, self._log, "-i", source, "-o", self.out, *options]

    def run(self, moment: Moment | None = None, number: int = signal.SIGKILL) -> Run:
        """Runs to the moment and sends this signal then, or to the end."""
        self._log.write_bytes(b"")
        before, started = self.answered(), time.monotonic()
        process = subprocess.Popen([*map(str, self._command)], stderr=subprocess.PIPE)
        try:
            reached = moment is not None and self._wait(process, moment, started)
            ended_at = self._end(process, moment, number) if reached else None
            said = process.communicate(timeout=DEADLINE)[1].decode()
        finally:
            process.kill()
        events = [json.loads(line) for line in self._log.read_bytes().splitlines()]
        assert b"Traceback" not in said.encode(), said
        tokens, done, spans = account(events, started)
        return Run(process.returncode, said, before, self.answered(), tokens, done, reached, ended_at, spans)

    def lines(self) -> list[bytes]:
        """The whole lines of the output."""
        return self.out.read_bytes().splitlines(keepends=True) if self.out.exists() else []

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.lines() if line.endswith(b"\n")]

    def answered(self) -> set[str]:
        return {row["custom_id"] for row in self.rows() if row["error"] is None}

    def _wait(self, process, moment, started) -> bool:
        """Whether the moment's phase came before the process ended."""
        seen, left = Counter(), self._good - len(self.answered())
        with self._log.open("rb") as log:
            while not self._is_now(moment, seen, left):
                if process.poll() is not None:
                    return False
                assert time.monotonic() - started < DEADLINE
                time.sleep(0.001)
                for line in iter(log.readline, b""):
                    if not line.endswith(b"\n"):  # read while it is being written
                        log.seek(-len(line), 1)
                        break
                    seen[json.loads(line)[1]] += 1
        return True

    def _end(self, process, moment, number) -> float | None:
        load, survey = self._spans
        lasts = {"load": load, "survey": survey, "first step": 0.1, "steady": 0.3, "end": 0.3}
        time.sleep(moment.place * lasts[moment.phase])
        if process.poll() is not None:
            return None
        process.send_signal(number)
        return time.monotonic()

    def _is_now(self, moment, seen, left) -> bool:
        match moment.phase:
            case "load":
                return True
            case "survey":
                return seen["loaded"] > 0
            case "first step":
                return seen["work"] > 0
            case "steady":
                return 0 < seen["done"] < left and len(self.lines()) >= moment.rows
            case "end":
                return seen["done"] >= left - moment.rows
        raise ValueError(moment.phase)


def account(events, started) -> tuple[Counter, dict[str, float], tuple[float, float]]:
    """Tokens and time of completion by custom_id, and `Run.spans`, from a witness's log."""
    tokens, done = Counter(), {}
    loaded = first = 0.0
    for when, kind, *rest in events:
        if kind == "loaded":
            loaded = when
        elif kind == "work":
            first = first or when
            for name, _, count in rest[0]:
                tokens[name] += count
        elif kind == "done":
            assert rest[0] not in done
            done[rest[0]] = when
    return tokens, done, (loaded - started, first - loaded)
