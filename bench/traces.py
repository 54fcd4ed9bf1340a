"""BlendServe's workloads rebuilt from length statistics: traces of one kind each, and mixes of a wanted density and sharing.

The statistics are those of arXiv 2411.16102 (table 4) and of the public length files, which are used themselves where `../shared` has
them. Prompts get random tokens of the right length behind what the trace's prompts share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.result import ROOT
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.workload import Workload

FILES = ROOT.parent / "shared" / "data" / "traces"
SYSTEM = 16  # tokens that all prompts of a trace begin with
LONGEST_VIDEO = 60_000
PEAK_A100 = Cost.paper(parameters=8.03e9, kv_width=1024, layers=32, flops=312e12, bandwidth=2039e9)


@dataclass(frozen=True)
class Trace:
    """Attributes:
    lengths: (random generator, count) -> int64 [count] prompt tokens and [count] answer tokens.
    families: prompts of one family share `prefix` tokens; 0 is none but the trace's own.
    known: answers' lengths are given by the request (video frames).
    """

    name: str
    lengths: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    families: int = 0
    prefix: int = 0
    known: bool = False

    @property
    def shared(self) -> int:
        """Tokens that a prompt has in common with others."""
        return SYSTEM + self.prefix


def _lognormal(draw: np.random.Generator, count: int, mean: float, spread: float, low: int, high: int):
    """Of this mean and coefficient of variation before it is cut off at both ends."""
    sigma = np.sqrt(np.log1p(spread * spread))
    return np.clip(draw.lognormal(np.log(mean) - sigma**2 / 2, sigma, count), low, high).astype(np.int64)


def _burstgpt(draw, count):
    return _lognormal(draw, count, 600, 1.0, 16, 8000), _lognormal(draw, count, 43.5, 1.2, 1, 2000)


def _mmlu(draw, count):
    return 608 + _lognormal(draw, count, 92, 0.5, 20, 400), np.full(count, 2)


def _openvid(draw, count):
    return _lognormal(draw, count, 64, 0.4, 16, 400), _lognormal(draw, count, 19000, 1.5, 256, LONGEST_VIDEO)


def _wildchat(draw, count):
    return 112 + _lognormal(draw, count, 190, 1.3, 8, 6000), _lognormal(draw, count, 262, 1.3, 1, 4000)


def _file(name: str, fitted: tuple[float, float, float, float], most: tuple[int, int]):
    """Pairs from a public file; where it is not at hand, independent log-normals (mu and sigma of prompt, of answer)."""

    def lengths(draw, count):
        rows = _rows(name)
        if rows is None:
            mu, sigma, mu_out, sigma_out = fitted
            prompt, answer = draw.lognormal(mu, sigma, count), draw.lognormal(mu_out, sigma_out, count)
        else:
            rows = rows[(rows[:, 0] <= most[0]) & (rows[:, 1] <= most[1])]
            prompt, answer = rows[draw.integers(0, len(rows), count)].T
        return np.clip(prompt, 1, most[0]).astype(np.int64), np.clip(answer, 1, most[1]).astype(np.int64)

    return lengths


@functools.cache
def _rows(name: str) -> np.ndarray | None:
    file = FILES / name
    if not file.exists():
        return None
    return np.loadtxt(file, delimiter=",", skiprows=1, usecols=(1, 2), dtype=np.int64)


BURSTGPT = Trace("burstgpt", _burstgpt)
MMLU = Trace("mmlu", _mmlu, families=57, prefix=592)
OPENVID = Trace("openvid", _openvid, known=True)
WILDCHAT = Trace("wildchat", _wildchat, families=400, prefix=96)
SHAREGPT = Trace("sharegpt", _file("sharegpt.csv", (4.01, 1.72, 5.35, 1.14), (3072, 1024)))
AZURE = Trace("azure", _file("AzureLLMInferenceTrace_code.csv", (7.0, 1.36, 2.79, 0.85), (8192, 2048)))
LMSYS = Trace("lmsys", _file("lmsys.csv", (3.47, 1.44, 4.63, 1.44), (3072, 1024)))
TRACES = {t.name: t for t in (BURSTGPT, MMLU, OPENVID, WILDCHAT, SHAREGPT, AZURE, LMSYS)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Mix:
    """A batch made of traces, one after the other.

    Attributes:
      outputs: int64 [requests], true lengths of the answers.
      known: bool [requests], whether the request says how long its answer is.
      counts: requests of each trace.
    """

    workload: Workload
    outputs: np.ndarray
    known: np.ndarray
    counts: dict[str, int]


class Unwritten:
    """The tokens of prompts that only say what they share, found when asked for: a page of them takes no memory.

    Args:
      starts: int64 [requests + 1], where each prompt begins.
      trace: int64 [requests], number of its trace. family: int64 [requests].
      shared: int64 [traces], tokens that its prompts have in common with others.
    """

    def __init__(self, starts: np.ndarray, trace: np.ndarray, family: np.ndarray, shared: np.ndarray):
        self._starts, self._trace, self._family, self._shared = starts, trace, family, shared

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        """int32 [rows, tokens], of places that are of one prompt in each row."""
        row = np.searchsorted(self._starts, at[:, 0], "right") - 1
        place = at - self._starts[row, None]
        trace = self._trace[row, None]
        shared = self._shared[trace]
        tokens = np.where(place < SYSTEM, trace + 1, 0)
        tokens = np.where((place == SYSTEM) & (shared > SYSTEM), 10 + self._family[row, None], tokens)
        return np.where(place == shared, row[:, None] + 200_000, tokens).astype(np.int32)


def build(parts: list[tuple[Trace, int]], seed: int = 0, *, fill: bool = False, written: bool = True) -> Mix:
    """`fill` writes every token; without, only those that tell prompts apart, and the rest costs no memory. Where not even those
    are `written`, the tokens are `Unwritten`."""
    draw = np.random.default_rng(seed)
    lengths = [trace.lengths(draw, count) for trace, count in parts]
    prompts = [
        np.maximum(prompt + (0 if trace.prefix else SYSTEM), trace.shared + 1)
        for (trace, _), (prompt, _) in zip(parts, lengths)
    ]
    starts = np.concatenate([[0], np.cumsum(np.concatenate(prompts))])
    if not written:
        return _unwritten(parts, lengths, starts, draw)
    size = int(starts[-1])
    tokens = draw.integers(1000, 128_000, size, dtype=np.int32) if fill else np.zeros(size, np.int32)
    first = 0
    for number, (trace, count) in enumerate(parts):
        at = starts[first : first + count]
        family = draw.integers(0, max(trace.families, 1), count)
        for place in range(trace.shared if fill else min(SYSTEM + 1, trace.shared)):
            tokens[at + place] = number + 1 if place < SYSTEM else 10 + family
        tokens[at + trace.shared] = np.arange(first, first + count) + 200_000  # of its own from here on
        first += count
    return _mix(parts, lengths, starts, tokens)


def _unwritten(parts, lengths, starts, draw) -> Mix:
    trace = np.concatenate([np.full(count, i, np.int64) for i, (_, count) in enumerate(parts)])
    family = np.concatenate([draw.integers(0, max(each.families, 1), count) for each, count in parts])
    shared = np.array([each.shared for each, _ in parts])
    return _mix(parts, lengths, starts, Unwritten(starts, trace, family, shared))


def _mix(parts, lengths, starts, tokens) -> Mix:
    outputs = np.concatenate([answer for _, answer in lengths])
    workload = Workload(tokens=tokens, starts=starts, answer_limits=outputs)
    known = np.concatenate([np.full(count, trace.known) for trace, count in parts])
    return Mix(
        workload=workload,
        outputs=outputs,
        known=known,
        counts={trace.name: count for trace, count in parts},
    )


def solve(
    compute_heavy: Trace,
    memory_heavy: Trace,
    sharing: Trace,
    *,
    density: float,
    share: float,
    cost: Cost = PEAK_A100,
    total: int | None = None,
    memory_count: int | None = None,
) -> list[tuple[Trace, int]]:
    """Request counts for a density (compute that is left over memory time) and a share of tokens saved by sharing.

    Two linear equations: sum n ((1 - s) comp - density mem) = 0 and sum n (s - share) comp = 0.

    Args:
      total: requests in all; or memory_count: requests of the memory-heavy trace.

    Raises:
      ValueError: no such mix.
    """
    rows = []
    for trace in (compute_heavy, sharing, memory_heavy):
        mix = build([(trace, 20_000)], seed=1)
        prompt, answer = mix.workload.prompt_tokens.astype(float), mix.outputs.astype(float)
        tokens, saved = (prompt + answer).mean(), float(trace.shared)
        memory = cost.memory(prompt, answer).mean()
        rows.append((cost.compute(tokens - saved) - density * memory, saved - share * tokens))
    (a, b), right = np.array(rows[:2]).T, -np.array(rows[2])
    counts = np.linalg.solve(np.array([a, b]), right)
    if not (counts >= 0).all():
        raise ValueError(
            f"{compute_heavy.name}, {memory_heavy.name} and {sharing.name} make no batch of density {density} that shares {share}"
        )
    scale = total / (counts.sum() + 1) if total is not None else float(memory_count or 1)
    first, second = (round(float(count) * scale) for count in counts)
    return [(compute_heavy, first), (sharing, second), (memory_heavy, max(round(scale), 1))]
