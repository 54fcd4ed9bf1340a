"""The host's expert kernel against what the machine can do: reading memory for one token, multiplying for 64.

On a machine shared with others wall time says more about them. Shares are therefore of the time that this process's
threads spent on a core, waiting for memory included, in calls that take turns; wall times stand beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.result import Result
from pallas_kernels._cpu.reading import read_all
from pallas_kernels.packed_experts import Record
from pallas_kernels.packed_experts.host import HostExperts

FORMATS = ("bfloat16", "int8", "int4")
TOKENS = (1, 4, 16, 64)
SIDE = 2048  # of the matrices whose product gives the matmul rate


def run(quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench fiddler-host")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    threads = parser.parse_args(options).threads
    # Mixtral-8x7B's expert, and one of a quarter of both widths for a look
    wide, width = (1024, 3584) if quick else (4096, 14336)
    rounds = 5 if quick else 15
    result = Result(
        "fiddler-host", {"model_dim": wide, "hidden_dim": width, "threads": threads, "rounds": rounds}
    )
    flops_rate, matmul_rows = _matmul_rates(rounds)
    result.rows += matmul_rows
    seconds = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        kernels = []
        for format in FORMATS:
            record = Record(wide, width, format)
            records = _mapped(Path(folder) / format, record)
            host = HostExperts(record, activation="silu", threads=threads)
            stack.callback(host.close)
            kernels.append((host, records))
        for tokens in TOKENS:
            for row in _measure(kernels, tokens, threads, rounds):
                seconds[row["kernel"], tokens] = row["core_s"]
                row["of_matmul"] = row["gflops_per_core"] * 1e9 / flops_rate
                result.rows.append(row)
                if tokens == 1:
                    result.summary[f"bandwidth_share_{_short(row['kernel'])}"] = row["of_read"]
        result.summary["matmul_share_64"] = min(row["of_matmul"] for row in result.rows[-len(FORMATS) :])
    result.rows.append(_numpy_row(wide, width, rounds))
    result.summary["int4_over_bf16"] = seconds["bfloat16", 1] / seconds["int4", 1]
    result.summary["over_numpy_bf16"] = result.rows[-1]["core_s"] / seconds["bfloat16", 1]
    return result


def _short(format: str) -> str:
    return "bf16" if format == "bfloat16" else format


def _mapped(path: Path, record: Record) -> np.ndarray:
    """Two experts of small random weights, mapped from a file."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for _ in range(2):
            shape = (record.model_dim, 2, record.hidden_dim)
            gate_up = (rng.random(shape, np.float32) - 0.5) / 16
            down = (rng.random((record.hidden_dim, record.model_dim), np.float32) - 0.5) / 16
            record.pack(gate_up, down).tofile(file)
    return np.memmap(path, np.uint8, "r").reshape(2, record.nbytes)


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds on cores, and on the wall."""
    wall, core = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - core, time.perf_counter() - wall


def _measure(
    kernels: list[tuple[HostExperts, np.ndarray]], tokens: int, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each kernel; they take turns, each with a plain read of as many bytes."""
    times: list[list[tuple[float, ...]]] = [[] for _ in kernels]
    for turn in range(rounds + 1):
        # each in turn reads the record that the other has just pushed out of the caches
        which, other = turn % 2, 1 - turn % 2
        for (host, records), each in zip(kernels, times, strict=True):
            x = np.full((tokens, host.record.model_dim), 0.01, np.float32)
            ids, shares = np.full((tokens, 1), which, np.int32), np.ones((tokens, 1), np.float32)
            kernel = _timed(partial(host, x, records, ids, shares))
            each.append((*kernel, *_timed(partial(read_all, records[other], threads))))
    return [_row(host.record, tokens, each[1:]) for (host, _), each in zip(kernels, times, strict=True)]


def _row(record: Record, tokens: int, times: list[tuple[float, ...]]) -> dict[str, Any]:
    core, wall, read_core, read_wall = np.median(times, axis=0)
    flops = 6 * tokens * record.model_dim * record.hidden_dim
    return {
        "kernel": record.format,
        "tokens": tokens,
        "core_s": float(core),
        "wall_s": float(wall),
        "gb_per_core_s": record.nbytes / core / 1e9,
        "of_read": float(read_core / core),
        "of_read_wall": float(read_wall / wall),
        "gflops_per_core": flops / core / 1e9,
    }


def _matmul_rates(rounds: int) -> tuple[float, list[dict[str, Any]]]:
    """The best float32 rate of numpy and XLA, operations per second on a core, and a row for each."""
    a = np.ones((SIDE, SIDE), np.float32)
    product = jax.jit(jnp.matmul)
    on_device = {dtype: jnp.asarray(a, dtype) for dtype in ("float32", "bfloat16")}
    calls: dict[str, Callable[[], object]] = {
        "numpy matmul float32": lambda: a @ a,
        "xla matmul float32": lambda: product(on_device["float32"], on_device["float32"]).block_until_ready(),
        "xla matmul bfloat16": lambda: product(
            on_device["bfloat16"], on_device["bfloat16"]
        ).block_until_ready(),
    }
    rows: list[dict[str, Any]] = []
    rates = {}
    for name, call in calls.items():
        call()
        core = float(np.median([_timed(call)[0] for _ in range(rounds)]))
        rates[name] = 2 * SIDE**3 / core
        rows.append({"kernel": name, "core_s": core, "gflops_per_core": rates[name] / 1e9})
    return max(rates["numpy matmul float32"], rates["xla matmul float32"]), rows


def _numpy_row(wide: int, width: int, rounds: int) -> dict[str, Any]:
    """One token through one expert by numpy, which multiplies no bfloat16: float32 weights, twice the bytes."""
    gate_up, down = np.full((wide, 2 * width), 0.01, np.float32), np.full((width, wide), 0.01, np.float32)
    x = np.full((1, wide), 0.01, np.float32)

    def call() -> np.ndarray:
        gate, up = np.split(x @ gate_up, 2, axis=1)
        return (gate / (1 + np.exp(-gate)) * up) @ down

    call()
    core, wall = np.median([_timed(call) for _ in range(rounds)], axis=0)
    return {"kernel": "numpy float32", "tokens": 1, "core_s": float(core), "wall_s": float(wall)}
