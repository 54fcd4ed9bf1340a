"""`python -m bench atom-matmul`: low-bit matmuls against our plain ones, by mode, shape and rows, and against the bytes' floor."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from bench import machine
from bench.result import Result
from jaxinfer.models import ModelConfig, RopeConfig
from jaxinfer.quant.form import quantization
from jaxinfer.quant.qarray import QArray, random_qarray
from pallas_kernels.matmul import matmul

SHAPES = {  # K, N
    "llama2_7b_qkv": (4096, 12288),
    "llama2_7b_gate_up": (4096, 22016),
    "llama2_7b_down": (11008, 4096),
    "llama3_8b_up": (4096, 14336),
    "llama3_8b_down": (14336, 4096),
    "mixtral_down": (14336, 4096),
}
QUOTED = "llama3_8b_up"
MODES = ("atom-w4a8", "atom-w4a4", "w8a8", "w4a16")
ROWS = (1, 16, 64, 256, 2048)
REPEATS = 5
WIDE = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    layers=1,
    heads=32,
    kv_heads=32,
    head_dim=128,
    mlp_width=14336,
    context_length=4096,
    rope=RopeConfig(theta=1e4, dim=128),
)


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench atom-matmul")
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--rows", action="append", type=int)
    parser.add_argument("--mode", action="append", choices=MODES)
    known = parser.parse_args(options)
    shapes = known.shape or ([QUOTED] if quick else list(SHAPES))
    rows = known.rows or ([1, 16] if quick else list(ROWS))
    plain = ("float32", "bfloat16") if jax.default_backend() == "cpu" else ("bfloat16",)
    result = Result("atom-matmul", {"plain": plain, "repeats": REPEATS, "quick": quick})
    bandwidth = machine.memory_bandwidth()
    for name in shapes:
        inputs, outputs = SHAPES[name]
        weights = {
            dtype: 0.02 * jax.random.normal(jax.random.key(0), (inputs, outputs), dtype) for dtype in plain
        }
        packed = {mode: _packed(mode, inputs, outputs) for mode in known.mode or MODES}
        for count in rows:
            x = jax.random.normal(jax.random.key(1), (count, inputs), plain[0])
            calls: dict[str, Callable[[], Any]] = {
                dtype: _call(matmul, x.astype(dtype), matrix) for dtype, matrix in weights.items()
            }
            calls |= {mode: _call(QArray.multiply, array, x) for mode, array in packed.items()}
            times = side_by_side(calls)
            for mode, array in packed.items():
                floor = (array.nbytes + x.nbytes + 4 * count * outputs) / bandwidth
                row = {"shape": name, "rows": count, "mode": mode, "seconds": times[mode]}
                row |= {f"over_{dtype}": times[dtype] / times[mode] for dtype in plain}
                row["of_byte_floor"] = floor / times[mode]
                result.rows.append(row)
                print(row, flush=True)
                if name == QUOTED:
                    label = mode.removeprefix("atom-").replace("-", "_")
                    result.summary[f"{label}_speedup_m{count}"] = row[f"over_{plain[0]}"]
    return result


def _packed(mode: str, inputs: int, outputs: int) -> QArray:
    return random_qarray(jax.random.key(0), (), (inputs,), (outputs,), quantization(mode, WIDE), True)


def _call(multiply: Callable, *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(multiply)
    return lambda: compiled(*args)


def side_by_side(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call; every round makes all of them, so that a busy machine slows all alike."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each) for name, each in times.items()}
