"""Compiles one whole step of the engine for an H200 that is not there: python -m bench.one_step JSON; prints JSON."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.attention.policy import quest_policy
from jaxinfer.config import load_config
from jaxinfer.core import MAX_TOP_LOGPROBS
from jaxinfer.engine.batch import Batcher
from jaxinfer.engine.memory import MemoryPlan
from jaxinfer.engine.overlap import TILE
from jaxinfer.engine.plan import StepPlan
from jaxinfer.engine.step import StepSpec, decode_steps, mixed_step
from jaxinfer.models.config import ModelConfig, MoEConfig, RopeConfig
from jaxinfer.models.decoder import abstract
from jaxinfer.quant.form import quantization
from jaxinfer.schedule.step_times import StepShape, Way
from pallas_kernels._h200.compile import h200

LLAMA = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    layers=4,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp_width=14336,
    context_length=32768,
    rope=RopeConfig(theta=5e5, dim=128),
    dtype="bfloat16",
)
MODELS = {
    "llama-3-8b": LLAMA,
    "mixtral-8x7b": dataclasses.replace(
        LLAMA, family="mixtral", moe=MoEConfig(experts=8, experts_per_token=2, width=14336), moe_layers=()
    ),
}
COMMON = ("cache.pages=4097", "engine.max_tokens_per_step=512", "model.dtype=bfloat16")
_KERNEL = re.compile(
    r'custom_call_target="mosaic_gpu[^"]*".*?op_name="[^"]*?([a-z0-9_]+)/(?:mpmd_map|pallas_call|core_map)'
)


def compile_step(
    model: str, weights: str, step: str, settings: list[str], way: str = "whole"
) -> dict[str, Any]:
    """Args:
      model: of MODELS, four layers of it.
      weights: bfloat16, or a mode of quantization.
      step: mixed or decode.
      settings: beside COMMON.
      way: of a mixed step, see `Way`.

    Returns:
      kernels by name; loops whose length the host has to know, and choices, for each of which it waits; operations that
      had to do without a kernel; bytes of temporary memory.
    """
    config = MODELS[model]
    if weights != "bfloat16":
        config = dataclasses.replace(config, quantization=quantization(weights, config))
    known = load_config(None, [*COMMON, *settings])
    quest = quest_policy(known, config.context_length)
    memory = MemoryPlan.make(config, known, quest)
    batcher = Batcher(memory.max_seqs, memory.table_width, memory.page_size)
    leaves, tree = jax.tree.flatten((abstract(config, "bfloat16"), None))
    spec = StepSpec(config, tree, known.engine.decode_steps, quest)
    state = jax.eval_shape(memory.make_state)
    tokens = memory.token_buckets[-1]
    shape = StepShape(Way(way), tokens, TILE if Way(way).in_two else 0)
    run: Callable[..., Any] = functools.partial(mixed_step, shape=shape)
    batch = batcher.mixed(StepPlan(), tokens)
    if step == "decode":
        run = functools.partial(decode_steps, steps=spec.decode_steps)
        batch = batcher.decode(StepPlan(), memory.row_buckets[-1])
    mesh = h200()
    sharding = NamedSharding(mesh, PartitionSpec())
    given = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=sharding), (leaves, state, batch)
    )
    refused = _Refused()
    logging.getLogger("pallas_kernels").addHandler(refused)
    program = jax.jit(lambda *args: run(spec, *args, top=MAX_TOP_LOGPROBS), donate_argnums=1)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = program.trace(*given).lower().compile()
    text, sizes = compiled.as_text(), compiled.memory_analysis()
    loops = [line for line in text.splitlines() if " while(" in line]
    return {
        "kernels": dict(sorted(collections.Counter(_KERNEL.findall(text)).items())),
        "loops of unknown length": sum("known_trip_count" not in line for line in loops),
        "choices": len(re.findall(r" conditional\(", text)),
        "without a kernel": sorted(refused.said),
        "temporary_bytes": sizes.temp_size_in_bytes,
        "copied_state_bytes": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    }


class _Refused(logging.Handler):
    """Collects what `dispatch` says of kernels that are not used."""

    def __init__(self):
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.said.add(record.getMessage())


if __name__ == "__main__":
    # Kernels are picked by the backend, which is the processor that only compiles here.
    jax.default_backend = lambda: "gpu"  # type: ignore[assignment]
    print(json.dumps(compile_step(**json.loads(sys.argv[1]))))
