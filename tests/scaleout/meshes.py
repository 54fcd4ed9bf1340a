"""Models on meshes of simulated devices, and the same on one."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import load_config
from jaxinfer.core import Request, SamplingParams
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.spread import Place
from jaxinfer.models import ModelConfig, MoEConfig, RopeConfig, abstract
from jaxinfer.models.placement import Slot
from jaxinfer.quant.form import quantization
from jaxinfer.scaleout.mesh import spread_over

TOKENS, ROWS = 20, 5  # of a step, and sequences: no axis of a weight has either size
BASE = (f"engine.max_seqs={ROWS}", f"engine.max_tokens_per_step={TOKENS}", "engine.decode_steps=4")
QUEST = ("sparsity.token_budget=32", "sparsity.dense_layers=0", "cache.page_size=8", "sparsity.reuse_steps=2")

LLAMA = ModelConfig(
    family="llama",
    vocab_size=256,
    hidden_size=64,
    layers=2,
    heads=8,
    kv_heads=4,
    head_dim=16,
    mlp_width=128,
    context_length=256,
    rope=RopeConfig(theta=10000.0, dim=16),
    dtype="float32",
)
EXPERTS = {"moe": MoEConfig(experts=8, experts_per_token=2, width=96), "windows": (), "moe_layers": ()}


@dataclass(frozen=True)
class Case:
    """A model, settings of its run, and whether its weights are packed."""

    config: ModelConfig
    overrides: tuple[str, ...] = ()
    mode: str = ""

    def model(self):
        """Random weights, so large that greedy answers vary; inputs of packed matrices in an order of their own."""
        draw = np.random.default_rng(1)

        def array(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            last = name.rpartition(".")[2]
            if last == "order":
                values = np.broadcast_to(draw.permutation(leaf.shape[-1]), leaf.shape)
            elif last in ("channel", "high_scale") or (last == "scale" and "norm" not in name):
                values = (
                    draw.integers(1, 16, leaf.shape)
                    if leaf.dtype == jnp.uint8
                    else np.full(leaf.shape, 0.003)
                )
            elif jnp.issubdtype(leaf.dtype, jnp.integer):
                limits = jnp.iinfo(leaf.dtype)
                values = draw.integers(limits.min, limits.max, leaf.shape)
            else:
                values = 0.25 * draw.standard_normal(leaf.shape) + (last == "scale")
            return jnp.asarray(values.astype(leaf.dtype))

        return jax.tree_util.tree_map_with_path(array, abstract(self.run_config))

    @property
    def run_config(self) -> ModelConfig:
        if not self.mode:
            return self.config
        return ModelConfig(**(vars(self.config) | {"quantization": quantization(self.mode, self.config)}))

    def engine(self, mesh: str | None = None) -> Engine:
        wanted = [] if mesh is None else [f"engine.mesh={mesh}"]
        settings = load_config(None, [*BASE, *self.overrides, *wanted])
        config, model = self.run_config, self.model()
        spread = spread_over(config, settings)
        if spread.place is not None:
            model = placed(spread.place, model)
        return Engine(config, spread.shares(model), settings, spread=spread)


def placed(at: Place, model):
    """The arrays of a whole model, each device's share on it."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        slot = Slot(leaf.dtype, at(name, leaf.shape))
        slot.put((0,) * leaf.ndim, np.asarray(leaf))
        return slot.array()

    return jax.tree_util.tree_map_with_path(place, model)


def prompts() -> list[list[int]]:
    """As many as run at once, some with a common prefix; the longest has more pages than QUEST attends to."""
    draw = np.random.default_rng(0)
    lengths = (70, 3, 33, 12, 45)
    several = [draw.integers(0, 256, length) for length in lengths]
    several[4][:33] = several[2]
    return [prompt.tolist() for prompt in several]


def answers(engine: Engine, sampling: list[SamplingParams] | None = None, score: bool = False) -> list:
    """Completions in the order of the prompts; greedy ones without `sampling`."""
    plain = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    requests = [
        Request(id=str(i), prompt_ids=np.asarray(prompt, np.int32), sampling=chosen, score=score)
        for i, (prompt, chosen) in enumerate(zip(prompts(), sampling or [plain] * ROWS, strict=True))
    ]
    done = {int(completion.request_id): completion for completion in engine.run(requests)}
    engine.check_integrity()
    return [done[i] for i in range(len(requests))]


def ids(completions: list) -> list[list[int]]:
    assert all(completion.error is None for completion in completions)
    return [list(completion.token_ids) for completion in completions]


def programs(engine: Engine) -> list[str]:
    """The compiled text of the programs that generate: a mixed step and decode steps, greedy."""
    device = engine.device
    nothing = type(engine.planner.plan(in_flight=False))()
    mixed = device._batcher.mixed(nothing, TOKENS)._replace(needs=None)
    decode = device._batcher.decode(nothing, ROWS)._replace(needs=None)
    given = (device._weights, device._state)
    lowered = (
        device._programs.mixed.lower(*given, mixed, top=20),
        device._programs.decode.lower(*given, decode, np.int32(1), top=20),
    )
    return [program.compile().as_text() for program in lowered]


_EXCHANGE = re.compile(
    r"= (?P<results>.*?) (?P<kind>all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)(-start)?\("
)


def exchanges(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Kind and result shapes of every exchange between devices in a compiled program."""
    found = []
    for match in _EXCHANGE.finditer(text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", match["results"]):
            found.append((match["kind"], tuple(int(n) for n in shape.split(",") if n)))
    return found
