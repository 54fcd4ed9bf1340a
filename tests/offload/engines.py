"""A tiny mixture of experts, whole on the device or split, and its engines."""

from __future__ import annotations

import bisect
import functools
from dataclasses import replace

import jax
import numpy as np

from jaxinfer.attention.policy import quest_policy
from jaxinfer.config import Settings, load_config
from jaxinfer.core import Completion, Request, SamplingParams
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.memory import MemoryPlan
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, MoEConfig, RopeConfig, init
from jaxinfer.models.decoder import without_experts
from jaxinfer.offload.store import ExpertStore
from pallas_kernels.packed_experts import Record

MOE = ModelConfig(
    family="qwen3_moe",
    vocab_size=97,
    hidden_size=32,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    context_length=256,
    rope=RopeConfig(theta=10000.0, dim=8),
    dtype="float32",
    eos_ids=(2,),
    moe=MoEConfig(experts=6, experts_per_token=2, width=48),
    moe_layers=(True, False, True, True),
)
LAYERS = (0, 2, 3)
EXPERT = Record(32, 48, "float32").nbytes
BASE = ("engine.max_seqs=8", "engine.max_tokens_per_step=32", "engine.layers=scan", "cache.pages=200")


@functools.cache
def model():
    made = init(MOE, jax.random.key(3), "float32")
    return jax.tree.map(lambda leaf: leaf * 12 if leaf.ndim > 1 else leaf, made)


def store(folder, format="float32") -> ExpertStore:
    """The records of the model's experts, as a first load would write them."""
    record, path = Record(MOE.hidden_size, MOE.moe.width, format), folder / f"{format}.experts"
    if not path.exists():
        with open(path, "wb") as file:
            for run in model().runs:
                if hasattr(run.mlp, "router"):
                    for gate_ups, downs in zip(
                        np.asarray(run.mlp.gate_up), np.asarray(run.mlp.down), strict=True
                    ):
                        for gate_up, down in zip(gate_ups, downs, strict=True):
                            record.pack(gate_up, down).tofile(file)
    return ExpertStore(path, record, LAYERS, MOE.moe.experts)


def whole(*overrides) -> Engine:
    return Engine(MOE, model(), load_config(None, [*BASE, *overrides]))


def split(folder, slots: int, *overrides, format="float32") -> Engine:
    """An engine whose budget holds just so many experts."""
    experts = () if format == "float32" else (f"offload.experts={format}",)
    settings = load_config(None, [*BASE, *experts, *overrides])
    settings = with_slots(MOE, settings, slots)
    return Engine(MOE, without_experts(model()), settings, experts=store(folder, format))


def with_slots(config: ModelConfig, settings: Settings, slots: int) -> Settings:
    """The settings with the smallest device memory that holds so many experts."""

    def on(memory: int) -> Settings:
        return replace(settings, offload=replace(settings.offload, device_memory=memory))

    def held(memory: int) -> int:
        try:
            plan = MemoryPlan.make(config, on(memory), quest_policy(settings, config.context_length))
        except ConfigError:
            return 0
        assert plan.expert_slots is not None
        return plan.expert_slots

    return on(bisect.bisect_left(range(2**28), slots, lo=2**16, key=held))


def requests(count: int, tokens: int = 8, seed: int = 0, longest: int = 60) -> list[Request]:
    """Prompts of all lengths, every other with the same beginning."""
    draw = np.random.default_rng(seed)
    shared = draw.integers(3, 97, 40)
    out = []
    for index in range(count):
        own = draw.integers(3, 97, draw.integers(1, longest))
        ids = np.concatenate([shared, own]) if index % 2 else own
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        out.append(Request(id=str(index), prompt_ids=ids.astype(np.int32), sampling=sampling))
    return out


def answers(engine: Engine, asked: list[Request]) -> list[Completion]:
    out = {completion.request_id: completion for completion in engine.run(asked)}
    engine.check_integrity()
    if engine.offload is not None:
        engine.offload.residents.check_integrity()
    return [out[request.id] for request in asked]


def ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    assert all(completion.error is None for completion in completions)
    return [tuple(completion.token_ids) for completion in completions]
