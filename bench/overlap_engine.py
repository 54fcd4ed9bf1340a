"""A scaled BlendServe trace through the engine itself, with steps run in the fastest way and one after the other, for `bench.overlap`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from bench.blendserve_engine import serve
from bench.one_step import LLAMA
from bench.overlap_steps import SETTING
from bench.result import ROOT
from bench.traces import BURSTGPT, MMLU, Trace, build, solve
from jaxinfer.config import Settings, load_config
from jaxinfer.core import Request, SamplingParams
from jaxinfer.engine.engine import Engine
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import init
from jaxinfer.schedule.step_times import StepTimes

LLAMA_8B = dataclasses.replace(
    LLAMA, layers=32, vocab_size=128_256, windows=(), moe_layers=(), eos_ids=(128_001,)
)
DENSITY, SHARE = 1.0, 0.2
LONGEST = 8000  # tokens of an answer: scaled, as the trace's own have up to 60,000


def _videos(draw, count):
    prompt, answer = (draw.lognormal(np.log(median), 0.6, count) for median in (60, LONGEST / 3))
    return np.clip(prompt, 16, 400).astype(np.int64), np.clip(answer, 16, LONGEST).astype(np.int64)


VIDEOS = Trace("videos", _videos, known=True)


def trace(requests: int, vocabulary: int, longest: int = LONGEST) -> list[Request]:
    """Short answers to long prompts, some of which share most of them, and long answers to short ones: of that density for
    Llama-3-8B on an H200, or with a smaller `longest` above it. Greedy, lengths forced."""
    parts = solve(BURSTGPT, VIDEOS, MMLU, density=DENSITY, share=SHARE, cost=SETTING.peak, total=requests)
    mix = build(parts, fill=True)
    starts, lengths = mix.workload.starts, np.minimum(mix.outputs, longest)
    return [
        Request(
            id=str(index),
            prompt_ids=(mix.workload.tokens[begin:end] % vocabulary).astype(np.int32),
            sampling=SamplingParams(temperature=0, max_tokens=int(length), ignore_eos=True),
        )
        for index, (begin, end, length) in enumerate(zip(starts, starts[1:], lengths))
    ]


def measured(
    config: ModelConfig = LLAMA_8B,
    overrides: tuple[str, ...] = (),
    requests: int = 600,
    longest: int = LONGEST,
) -> tuple[StepTimes | None, dict[str, Any]]:
    """The table that the engine measured, and throughput of `blend` over depth-first order, and over itself without overlap.

    Weights are random; each run is the second of its kind, when nothing is left to be compiled.
    """
    model = init(config, jax.random.key(0))
    settings: Settings = load_config(ROOT / "configs" / "h200.toml", ["engine.overlap=auto", *overrides])
    plain = load_config(ROOT / "configs" / "h200.toml", ["engine.overlap=off", *overrides])
    row: dict[str, Any] = {"part": "engine"}
    times = None
    for name, chosen, policies in (("overlap", settings, ("dfs", "blend")), ("plain", plain, ("blend",))):
        engine = Engine(config, model, chosen)
        if times is None:
            times = engine.device.overlap.times
        work = trace(requests, config.vocab_size, longest)
        for policy in policies:
            serve(engine, work, policy)
            figures, _ = serve(engine, work, policy)
            row[f"{name}_{policy}_seconds"] = figures["seconds"]
        del engine
    row["blend_over_dfs"] = row["overlap_dfs_seconds"] / row["overlap_blend_seconds"]
    row["overlap_gain"] = row["plain_blend_seconds"] / row["overlap_blend_seconds"]
    return times, row
