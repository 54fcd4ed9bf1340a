"""Signals at any moment of a real run: the same command goes on, nothing is lost or doubled, and little is done twice."""

import random
import signal
import statistics
from collections import Counter

import pytest

from jaxinfer.config import EngineSettings
from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models.tokenizer import Tokenizer

from .killing import Batch, Moment, Run
from .mixed import SYSTEM, Mixed, mixed

FLUSH_SECONDS = 0.1
LATE = 2.0  # seconds; a flush that comes later than this does not come
SPECULATION = 0.02  # of all tokens: those computed beyond an answer's end vary with what runs beside it
MAX_SEQS = EngineSettings().max_seqs


def moments(count: int, rows: int, seed: int) -> list[Moment]:
    """Two fifths while it makes progress, the others while it loads, reads and begins, and the last tenth at the end."""
    draw = random.Random(seed)
    steady, end = count * 2 // 5, count // 10 or 1
    early = ["first step", "survey", "load"] * count
    phases = early[: count - steady - end] + ["steady"] * steady
    draw.shuffle(phases)
    targets = iter(sorted(draw.randrange(rows * 3 // 4) for _ in range(steady)))
    chosen = [Moment(p, draw.random(), next(targets) if p == "steady" else 0) for p in phases]
    return chosen + [Moment("end", draw.random(), draw.randrange(6)) for _ in range(end)]


def answers(rows: list[dict]) -> dict[str, list]:
    """Texts and why they ended; log-probabilities differ in their last digits with the batch."""
    return {
        r["custom_id"]: [_said(c) for c in r["response"]["body"]["choices"]] for r in rows if not r["error"]
    }


def _said(choice: dict) -> tuple[str, str]:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, choice["finish_reason"]


def errors(rows: list[dict]) -> Counter:
    return Counter((r["custom_id"], r["error"]["code"], r["error"]["line"]) for r in rows if r["error"])


def check_end(run: Run, already: list[bytes], now: list[bytes], several: int) -> None:
    """What must hold after each run, however it ended.

    Args:
      already, now: lines of the output before it and after it.
      several: most rows of several choices that were admitted.
    """
    whole = [line for line in already if line.endswith(b"\n")]
    assert now[: len(whole)] == whole  # what was safe stays as it is
    assert not run.tokens.keys() & run.before  # and is not answered again
    assert run.after - run.before <= run.done.keys()
    # Rows of several choices may wait for a place for the others of them.
    assert len(run.unfinished) <= MAX_SEQS + several
    assert run.oldest_unwritten < LATE
    if run.status == -signal.SIGTERM:  # before Python listens to it, or after
        assert not run.lost
    if run.status == 130:  # asked politely, it writes all that it was handed, and whole rows
        handed = sorted(run.done, key=run.done.__getitem__)
        assert run.unwritten <= set(handed[-1:])  # the signal may come while the last is on its way
        assert all(line.endswith(b"\n") for line in now)
        assert "goes on from there" in run.said or "nothing was written" in run.said


def check_work(runs: list[Run], alone: Run, shared: int) -> None:
    """All work is the uninterrupted work, what was in flight at each end, and the prefixes that were in the cache then.

    Args:
      shared: tokens with which several prompts begin.
    """
    assert sum(len(run.tokens) for run in runs) == len(alone.tokens) + sum(len(run.lost) for run in runs)
    resumed = sum(1 for run in runs if run.tokens) - 1
    in_flight = sum(run.lost_tokens for run in runs)
    assert computed(runs) <= computed([alone]) * (1 + SPECULATION) + in_flight + resumed * shared


def computed(runs: list[Run]) -> int:
    return sum(sum(run.tokens.values()) for run in runs)


def shared_tokens(batch: Mixed) -> int:
    tokenizer = Tokenizer(EMBEDDED_MODEL)
    return len(tokenizer.chat([SYSTEM])) + sum(len(tokenizer.encode(prefix)) for prefix in batch.prefixes)


@pytest.mark.parametrize(
    "number, rows, ends, cache",
    [
        (signal.SIGKILL, 150, 3, "auto"),
        pytest.param(signal.SIGKILL, 2000, 50, "own", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1000, 20, "auto", marks=pytest.mark.slow),
    ],
    ids=["SIGKILL-3", "SIGKILL-50", "SIGTERM-20"],
)
def test_ended_at_any_moment(tmp_path, number, rows, ends, cache):
    """With a compilation cache of their own, runs are killed while they compile and write it, too."""
    given = mixed(rows)
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(given.lines) + b"\n")
    options = ["--set", "batch.created=1", "--set", f"batch.flush_seconds={FLUSH_SECONDS}"]
    alone_batch = Batch(tmp_path / "alone", source, *options, good=len(given.good))
    alone = alone_batch.run()
    assert alone.status == 1 and alone.after == given.good == alone.tokens.keys()

    if cache != "auto":
        options += ["--set", f"engine.compile_cache={tmp_path / 'cache'}"]
    batch = Batch(tmp_path / "ended", source, *options, good=len(given.good), spans=alone.spans)
    runs = []
    for moment in [*moments(ends, rows, seed=rows), None]:
        already = batch.lines()
        runs.append(batch.run(moment, number))
        print(report(runs[-1], moment))
        assert not moment or moment.phase != "steady" or runs[-1].reached, (
            "rows were not written as they finished"
        )
        check_end(runs[-1], already, batch.lines(), several=rows // 15)
    ended = [run for run in runs if run.status in (-number, 130)]
    assert len(ended) >= ends * 9 // 10 and runs[-1].status == 1

    final, expected = batch.rows(), alone_batch.rows()
    assert len(final) == len(given.lines)
    assert answers(final) == answers(expected) and errors(final) == errors(expected)
    assert sorted(row["id"] for row in final) == sorted(row["id"] for row in expected)
    check_work(runs, alone, shared_tokens(given))
    assert statistics.median(run.oldest_unwritten for run in ended) < 2 * FLUSH_SECONDS
    print(summary(ended, runs, alone))


def report(run: Run, moment: Moment | None) -> str:
    return (
        f"{moment.phase if moment else 'to the end':12s} status {run.status:3d}: {len(run.after):5d} answered, "
        f"{len(run.unfinished):3d} running and {len(run.unwritten):3d} unwritten lost "
        f"({run.oldest_unwritten:.2f} s old), {run.lost_tokens} tokens"
    )


def summary(ended: list[Run], runs: list[Run], alone: Run) -> str:
    lost = [len(run.lost) for run in ended]
    return (
        f"{len(ended)} ends: {sum(lost)} rows begun in vain, at most {max(lost)} at one; {computed(runs):,} tokens "
        f"computed, {computed([alone]):,} uninterrupted, {sum(run.lost_tokens for run in ended):,} for rows lost"
    )
