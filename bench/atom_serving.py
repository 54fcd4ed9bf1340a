"""`python -m bench atom-serving`: a whole model of random weights, quantized and not, through the engine at one memory budget."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from bench import workloads
from bench.result import Result
from jaxinfer.config import load_config
from jaxinfer.core import Request, SamplingParams
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.memory import weight_bytes
from jaxinfer.models import init, unstack
from jaxinfer.models.config import ModelConfig
from jaxinfer.quant.form import quantization

MODES = ("none", "w8a8", "atom-w4a8", "atom-w4a4")
CACHES = {"none": "auto", "w8a8": "int8", "atom-w4a8": "int4", "atom-w4a4": "int4"}  # at one budget
PROMPT, REPEATS = 16, 5
REQUESTS = 16  # at one budget


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench atom-serving")
    parser.add_argument("--model", choices=workloads.MODELS, default="llama-110m")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--tokens", type=int, default=32 if quick else 96, help="of each answer")
    parser.add_argument("--mode", action="append", choices=MODES)
    parser.add_argument(
        "--budget",
        type=int,
        action="append",
        help="MiB for weights and cache; without it, only batches are timed",
    )
    known = parser.parse_args(options)
    config, modes = workloads.MODELS[known.model], known.mode or list(MODES)
    batches = known.batch or ([] if known.budget else [1, 8])
    settings = {"model": known.model, "tokens": known.tokens, "prompt": PROMPT, "dtype": config.dtype}
    result = Result("atom-serving", settings | {"repeats": REPEATS, "quick": quick})
    for batch in batches:
        result.rows += _together(config, modes, batch, known.tokens)
    for budget in known.budget or []:
        result.rows += _within(config, modes, budget, known.tokens)
    for row in result.rows:
        if row["mode"] != "none":
            what = f"decode_{row['batch']}" if "batch" in row else f"at_{row['budget_mib']}_mib"
            result.summary[f"{row['mode'].replace('-', '_')}_{what}"] = row["over_none"]
    return result


def _together(config: ModelConfig, modes: list[str], batch: int, tokens: int) -> list[dict[str, Any]]:
    engines = {mode: _engine(config, mode, [f"engine.max_seqs={batch}"]) for mode in modes}
    middle = _medians(engines, batch, tokens)
    return [
        {
            "batch": batch,
            "mode": mode,
            "weight_bytes": engines[mode].memory.weight_bytes,
            "tokens_per_s": batch * tokens / middle[mode],
            "over_none": middle["none"] / middle[mode] if "none" in middle else float("nan"),
        }
        for mode in modes
    ]


def _within(config: ModelConfig, modes: list[str], budget: int, tokens: int) -> list[dict[str, Any]]:
    """All modes, each with the cache that goes with it, as large as weights leave it of so many MiB."""
    engines = {}
    for mode in modes:
        left = budget * 2**20 - weight_bytes(_quantized(config, mode), config.dtype)
        if left > 0:
            cache = [f"cache.memory={left}", f"cache.dtype={CACHES[mode]}"]
            engines[mode] = _engine(config, mode, [f"engine.max_seqs={REQUESTS}", *cache])
    middle = _medians(engines, REQUESTS, tokens)
    return [
        {
            "budget_mib": budget,
            "mode": mode,
            "weight_bytes": engine.memory.weight_bytes,
            "pool_tokens": engine.memory.pool_tokens,
            "tokens_per_s": REQUESTS * tokens / middle[mode],
            "over_none": middle["none"] / middle[mode] if "none" in middle else float("nan"),
        }
        for mode, engine in engines.items()
    ]


def _medians(engines: dict[str, Engine], batch: int, tokens: int) -> dict[str, float]:
    """Seconds of each; every repeat runs all of them once, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {mode: [] for mode in engines}
    for repeat in range(REPEATS + 1):
        for mode, engine in engines.items():
            taken = _seconds(engine, batch, tokens)
            if repeat:  # the first one compiles
                times[mode].append(taken)
    return {mode: statistics.median(each) for mode, each in times.items()}


def _quantized(config: ModelConfig, mode: str) -> ModelConfig:
    form = None if mode == "none" else quantization(mode, config)
    return dataclasses.replace(config, quantization=form)


def _engine(config: ModelConfig, mode: str, settings: list[str]) -> Engine:
    config = _quantized(config, mode)
    model = init(config, jax.random.key(0))
    if jax.default_backend() == "cpu":
        model = unstack(model, config)
    assert weight_bytes(config, config.dtype) == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return Engine(config, model, load_config(None, [*settings, "engine.decode_steps=32"]))


def _seconds(engine: Engine, batch: int, tokens: int) -> float:
    """Of a whole batch; prompts are short, so nearly all of it is decoding."""
    draw = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [draw.integers(3, engine.config.vocab_size, PROMPT).astype(np.int32) for _ in range(batch)]
    engine.forget_prefixes()
    begin = time.perf_counter()
    done = list(
        engine.run(Request(id=str(i), prompt_ids=p, sampling=sampling) for i, p in enumerate(prompts))
    )
    assert all(out.error is None for out in done)
    return time.perf_counter() - begin
