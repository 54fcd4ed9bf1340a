"""The engine on a mixed batch: rates, steps, padding, sharing, and where the time goes."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from typing import Any

import jax

from bench import machine, workloads
from bench.result import Result
from jaxinfer.config import Settings, load_config
from jaxinfer.engine.engine import Engine
from jaxinfer.models import init, unstack
from jaxinfer.models.config import ModelConfig


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench engine")
    parser.add_argument("--model", choices=workloads.MODELS, action="append")
    parser.add_argument("--repeats", type=int, default=1 if quick else 3)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    known = parser.parse_args(options)
    settings = load_config(None, known.set)
    result = Result("engine", dataclasses.asdict(settings) | {"quick": quick})
    rate, bandwidth = machine.matmul_rate(), machine.memory_bandwidth()
    for name in known.model or workloads.MODELS:
        config = workloads.MODELS[name]
        rows = measure(config, settings, quick=quick, repeats=known.repeats)
        for row in rows:
            row["of_matmul_limit"] = row.pop("flops") / rate / row["seconds"]
        result.rows += [{"model": name} | row for row in rows]
        middle = sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2]
        prefix = "" if name == "llama-110m" else f"{name.split('-')[0]}_"
        names = (
            "tokens_per_s",
            "host_share",
            "compilations_after_warmup",
            "padding_share",
            "cached_share",
            "of_matmul_limit",
        )
        result.summary |= {prefix + key: float(middle[key]) for key in names}
    result.summary |= {"matmul_gflops": rate / 1e9, "memory_gb_per_s": bandwidth / 1e9}
    return result


def measure(config: ModelConfig, settings: Settings, *, quick: bool, repeats: int) -> list[dict[str, Any]]:
    """The mixed batch `repeats` times; each run starts with an empty prefix cache."""
    engine = make_engine(config, settings)
    jobs = workloads.mixed(16 if quick else 64, vocabulary=config.vocab_size)
    drain(engine, jobs)  # compiles what the batch needs
    return [measure_once(engine, jobs) for _ in range(repeats)]


def make_engine(config: ModelConfig, settings: Settings) -> Engine:
    model = init(config, jax.random.key(0))
    if jax.default_backend() == "cpu":
        model = unstack(model, config)
    return Engine(config, model, settings)


def drain(engine: Engine, jobs: list[workloads.Job]) -> float:
    """Seconds to answer all jobs from an empty prefix cache."""
    engine.forget_prefixes()
    start = time.perf_counter()
    answered = sum(1 for out in engine.run(workloads.requests(jobs)) if out.error is None)
    taken = time.perf_counter() - start
    assert answered == len(jobs)
    return taken


def measure_once(engine: Engine, jobs: list[workloads.Job]) -> dict[str, Any]:
    before = copy.copy(engine.metrics)
    taken = drain(engine, jobs)
    counts = engine.metrics.since(before)
    tokens = sum(len(job.prompt) + job.answer for job in jobs)
    unique = workloads.unique_prompt_tokens(jobs, engine.cache.page_size)
    answers = sum(job.answer for job in jobs)
    host = counts.plan_seconds + counts.launch_seconds + counts.update_seconds
    return {
        "seconds": taken,
        "tokens_per_s": tokens / taken,
        "steps": counts.steps,
        "calls": counts.calls,
        "compilations_after_warmup": counts.compilations,
        "padding_share": counts.padding_tokens / (counts.padding_tokens + counts.computed_tokens),
        "cached_share": counts.cached_tokens / counts.prompt_tokens,
        "computed_over_unique": counts.computed_tokens / (unique + answers - len(jobs)),
        "host_share": host / taken,
        "plan_s": counts.plan_seconds,
        "launch_s": counts.launch_seconds,
        "wait_s": counts.wait_seconds,
        "update_s": counts.update_seconds,
        "flops": workloads.matmul_flops(engine.config, unique + answers - len(jobs), answers),
    }


def median_seconds(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["seconds"] for run in runs)
