"""A mixture of experts four times larger than its device: who computes the experts, by batch and by length of the prompt.

Every case runs twice: with one token to answer, which gives the time to the first token of all its requests, and with
`--tokens`, which gives the time between tokens and the rate. Policies take turns; medians of several rounds are compared.
"device" has no budget: all experts are on the device. "layers" is a static split by whole layers, as llama.cpp has it.

On a CPU the device and the host are the same cores and the link is a copy, so the ratios to "device" say what the offload
itself costs there, not what it wins. On a GPU the model has Mixtral-8x7B's shapes, random weights and 24 GB.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.result import ROOT, Result
from bench.workloads import Job, requests
from jaxinfer.config import Settings, load_config
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.memory import MemoryPlan
from jaxinfer.errors import ConfigError
from jaxinfer.llm import EMBEDDED_MODEL, LLM
from jaxinfer.models import abstract, unstack
from jaxinfer.models.config import ModelConfig, MoEConfig, RopeConfig
from jaxinfer.models.decoder import without_experts
from jaxinfer.models.manifest import read_manifest
from jaxinfer.offload.records import expert_record
from jaxinfer.offload.store import ExpertStore
from pallas_kernels.packed_experts import Record

SHARED = ROOT.parent / "shared" / "data"
OVER = 4  # experts of the model, over those that the device holds
POLICIES = {
    "device": (),
    "balanced": ("offload.policy=balanced",),
    "fiddler": ("offload.policy=fiddler", "offload.adaptive=false"),
    "stream": ("offload.policy=stream",),
    "layers": ("offload.policy=host", "offload.placement=whole_layers", "offload.adaptive=false"),
}


@dataclass(frozen=True)
class Case:
    """Attributes:
    batch: requests at a time; prompt: tokens of each.
    """

    batch: int
    prompt: int


@dataclass(frozen=True)
class Model:
    """Attributes:
    folder: converted, or a Hugging Face folder to convert; None: random weights of `config`.
    memory: of the device; None for what holds a quarter of the experts.
    """

    cases: tuple[Case, ...]
    folder: Path | None = None
    config: ModelConfig | None = None
    memory: str | None = None
    experts: str = "stored"


def _mixtral(part: int, layers: int, vocabulary: int) -> ModelConfig:
    """Mixtral-8x7B, its widths divided by `part`."""
    return ModelConfig(
        family="mixtral",
        vocab_size=vocabulary,
        hidden_size=4096 // part,
        layers=layers,
        heads=32 // part,
        kv_heads=8 // part,
        head_dim=128,
        mlp_width=14336 // part,
        context_length=32768,
        rope=RopeConfig(theta=1e6, dim=128),
        moe=MoEConfig(experts=8, experts_per_token=2, width=14336 // part),
        dtype="bfloat16",
    )


BATCHES = tuple(Case(batch, 32) for batch in (1, 4, 16, 64))
CPU_MODELS = {
    "mixtral-quarter": Model((*BATCHES, Case(1, 512)), config=_mixtral(4, 4, 4096)),
    "embedded": Model((*BATCHES, Case(1, 512), Case(1, 8000)), EMBEDDED_MODEL),
    "babyllama105-moe": Model((*BATCHES, Case(1, 192)), SHARED / "checkpoints" / "babyllama105-moe"),
}
_BIG = _mixtral(1, 32, 32000)
_LONG = (Case(1, 512), Case(1, 2048), Case(1, 8192))
GPU_MODELS = {
    "mixtral-8x7b-int4": Model((*BATCHES, *_LONG), config=_BIG, memory="24GiB", experts="int4"),
    "mixtral-8x7b": Model((*BATCHES, *_LONG), config=_BIG, memory="24GiB"),
}


def run(*, quick: bool, options: list[str]) -> Result:
    models = CPU_MODELS if jax.default_backend() == "cpu" else GPU_MODELS
    parser = argparse.ArgumentParser(prog="python -m bench fiddler-offload")
    parser.add_argument("--model", choices=models, action="append")
    parser.add_argument("--policy", choices=POLICIES, action="append", help="again for more; all otherwise")
    parser.add_argument("--tokens", type=int, default=8 if quick else 32, help="that each request answers")
    parser.add_argument("--repeats", type=int, default=1 if quick else 3)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    known = parser.parse_args(options)
    names = known.model or [name for name, model in models.items() if _is_there(name, model)]
    result = Result("fiddler-offload", {"tokens": known.tokens, "repeats": known.repeats, "quick": quick})
    for name in names:
        policies = known.policy or [p for p in POLICIES if p != "device" or models[name].memory is None]
        with contextlib.ExitStack() as stack:
            engines = {
                policy: stack.enter_context(_engine(models[name], policy, known.set)) for policy in policies
            }
            cases = models[name].cases[:1] if quick else models[name].cases
            for case in cases:
                rows = _compare(engines, case, known.tokens, known.repeats)
                result.rows += [{"model": name} | row for row in rows]
    _summarize(result, names[0])
    return result


def _is_there(name: str, model: Model) -> bool:
    if model.folder is not None and not model.folder.exists():
        print(f"{name}: {model.folder} is not there, left out")
        return False
    return True


def _compare(engines: dict[str, Engine], case: Case, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each engine. Fresh random prompts every time, the same for all engines."""
    vocabulary = next(iter(engines.values())).config.vocab_size
    draw = np.random.default_rng(case.batch * case.prompt)
    runs: dict[str, list[dict[str, float]]] = {policy: [] for policy in engines}
    for turn in range(repeats + 1):
        prompts = [draw.integers(3, vocabulary, case.prompt).tolist() for _ in range(case.batch)]
        for policy, engine in engines.items():
            row = _measure(engine, prompts, tokens)
            if turn:  # the first compiles
                runs[policy].append(row)
    medians = {
        policy: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for policy, rows in runs.items()
    }
    out = []
    for policy, row in medians.items():
        ratios = {
            f"vs_{other}": row["tokens_per_s"] / medians[other]["tokens_per_s"]
            for other in ("device", "stream")
            if other in medians
        }
        firsts = {
            f"first_vs_{other}": medians[other]["first_token_s"] / row["first_token_s"]
            for other in ("device", "stream")
            if other in medians
        }
        shape = {"policy": policy, "batch": case.batch, "prompt": case.prompt}
        out.append(shape | row | ratios | firsts)
    return out


def _measure(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    first = _seconds(engine, [Job(prompt, 1) for prompt in prompts])
    before = _counts(engine)
    whole = _seconds(engine, [Job(prompt, tokens) for prompt in prompts])
    counts = {name: value - before[name] for name, value in _counts(engine).items()}
    visits = max(counts["expert_visits"], 1)
    return {
        "tokens_per_s": len(prompts) * tokens / whole,
        "first_token_s": first,
        "between_tokens_s": (whole - first) / (tokens - 1),
        "hit_rate": counts["expert_hits"] / visits if counts["expert_visits"] else 1.0,
        "host_share": counts["expert_on_host"] / visits,
        "link_mib_per_token": counts["expert_streamed_bytes"] / 2**20 / (len(prompts) * tokens),
    }


def _seconds(engine: Engine, jobs: list[Job]) -> float:
    engine.forget_prefixes()
    start = time.perf_counter()
    for out in engine.run(requests(jobs)):
        assert out.error is None, out.error
    return time.perf_counter() - start


def _counts(engine: Engine) -> dict[str, float]:
    names = ("expert_visits", "expert_hits", "expert_on_host", "expert_streamed_bytes")
    counts = {} if engine.offload is None else engine.offload.metrics()
    return {name: counts.get(name, 0) for name in names}


def _summarize(result: Result, first: str) -> None:
    """Of the first model: how the rates of one request and of the largest batch compare."""
    rows = {
        (row["policy"], row["batch"]): row
        for row in reversed(result.rows)
        if row["model"] == first and row["prompt"] == BATCHES[0].prompt
    }
    ours = rows.get(("balanced", 1))
    if ours is None:
        return
    result.summary["tokens_per_s_1"] = ours["tokens_per_s"]
    result.summary["hit_rate"] = ours["hit_rate"]
    for policy, name in (
        ("stream", "vs_stream_everything_1"),
        ("fiddler", "vs_fiddler_policy"),
        ("device", "vs_all_on_device_1"),
    ):
        if (policy, 1) in rows:
            result.summary[name] = ours["tokens_per_s"] / rows[policy, 1]["tokens_per_s"]
    rates = [
        rows["balanced", case.batch]["tokens_per_s"] for case in BATCHES if ("balanced", case.batch) in rows
    ]
    result.summary["smallest_step_up_with_batch"] = min(
        (after / before for before, after in itertools.pairwise(rates)), default=1.0
    )


@contextlib.contextmanager
def _engine(model: Model, policy: str, overrides: list[str]) -> Iterator[Engine]:
    """All of the model on the device, or a part of its experts."""
    longest = max(case.prompt for case in model.cases) + 256
    pages = max(-(-(case.prompt + 256) // 16) * case.batch for case in model.cases) + 8
    common = [f"engine.max_context={longest}", f"cache.pages={pages}", *overrides]
    with tempfile.TemporaryDirectory() as scratch:
        if policy != "device":
            # unrolled, every layer's callbacks would be compiled; and there are no stacked experts to slice
            common += ["engine.layers=scan", f"offload.experts={model.experts}", f"offload.folder={scratch}"]
        engine = _make(model, load_config(None, [*common, *POLICIES[policy]]), policy, Path(scratch))
        yield engine
        if engine.offload is not None:
            engine.offload.close()


def _make(model: Model, settings: Settings, policy: str, scratch: Path) -> Engine:
    if model.folder is not None:
        folder = _converted(model.folder, scratch)
        config = read_manifest(folder).config
        context = min(settings.engine.max_context or 0, config.context_length)
        settings = replace(settings, engine=replace(settings.engine, max_context=context))
        return LLM(folder, config=_within(config, settings, model, policy)).engine
    assert model.config is not None
    settings = _within(model.config, settings, model, policy)
    if policy == "device":
        weights = _random(abstract(model.config))
        return Engine(model.config, unstack(weights, model.config), settings)
    store = _random_store(model.config, expert_record(model.config, settings.offload, model.config.dtype))
    return Engine(model.config, _random(without_experts(abstract(model.config))), settings, experts=store)


def _within(config: ModelConfig, settings: Settings, model: Model, policy: str) -> Settings:
    """The settings with the device's memory."""
    if policy == "device":
        return settings
    assert config.moe is not None
    slots = sum(config.moe_layers) * config.moe.experts // OVER

    def with_memory(memory: str | int) -> Settings:
        return replace(settings, offload=replace(settings.offload, device_memory=memory))

    def held(memory: int) -> int:
        try:
            return MemoryPlan.make(config, with_memory(memory)).expert_slots or 0
        except ConfigError:
            return 0

    if model.memory is not None:
        return with_memory(model.memory)
    return with_memory(bisect.bisect_left(range(2**34), slots, lo=2**20, key=held))


def _converted(folder: Path, scratch: Path) -> Path:
    if (folder / "jaxinfer.json").exists():
        return folder
    from convert.convert import convert

    convert(folder, scratch / "converted")
    return scratch / "converted"


def _random(shapes: Any) -> Any:
    """Small random weights; ones where there is one axis, as in norms."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [
        0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        if leaf.ndim > 2 or min(leaf.shape) > 64
        else jax.numpy.ones(leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


def _random_store(config: ModelConfig, record: Record) -> ExpertStore:
    """Records in memory, all of one expert's bytes: they differ in place, not in contents."""
    assert config.moe is not None
    layers = tuple(layer for layer, has_experts in enumerate(config.moe_layers) if has_experts)
    draw = np.random.default_rng(0)
    shape = (config.hidden_size, 2, config.moe.width)
    packed = record.pack(
        0.04 * (draw.random(shape, np.float32) - 0.5),
        0.04 * (draw.random((shape[2], shape[0]), np.float32) - 0.5),
    )
    handle = os.memfd_create("experts")
    with os.fdopen(handle, "wb") as file:
        for _ in range(len(layers) * config.moe.experts):
            packed.tofile(file)
        file.flush()
        return ExpertStore(Path(f"/proc/self/fd/{handle}"), record, layers, config.moe.experts)
