"""Tiny models and an oracle that knows nothing of pages, batches or caches."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import Settings, load_config
from jaxinfer.core import Completion, Request, SamplingParams
from jaxinfer.engine.engine import Engine
from jaxinfer.models import ModelConfig, MoEConfig, RopeConfig, forward, init, logits, unstack

LLAMA = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    context_length=256,
    rope=RopeConfig(theta=10000.0, dim=8),
    dtype="float32",
    eos_ids=(2,),
)


def variant(**changes) -> ModelConfig:
    return dataclasses.replace(LLAMA, **{"windows": (), "moe_layers": ()} | changes)


MIXTRAL = variant(family="mixtral", moe=MoEConfig(experts=4, experts_per_token=2, width=24))


@functools.cache
def weights(config: ModelConfig, seed: int = 0):
    """Random weights large enough that greedy answers vary."""
    model = init(config, jax.random.key(seed), "float32")
    return jax.tree.map(lambda leaf: leaf * 12 if leaf.ndim > 1 else leaf, model)


def make_engine(config: ModelConfig = LLAMA, overrides: tuple[str, ...] = (), tokenizer=None) -> Engine:
    settings: Settings = load_config(None, ["engine.max_seqs=8", "engine.max_tokens_per_step=32", *overrides])
    engine = Engine(config, unstack(weights(config), config), settings, tokenizer)
    _PROGRAMS.append(engine.device._programs)  # compiled programs go with the last engine that uses them
    return engine


_PROGRAMS: list = []


def request(name: str, prompt, **sampling) -> Request:
    sampling = {"temperature": 0, "max_tokens": 8, "ignore_eos": True} | sampling
    return Request(id=name, prompt_ids=np.asarray(prompt, np.int32), sampling=SamplingParams(**sampling))


def answers(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    out = {completion.request_id: completion for completion in engine.run(requests)}
    engine.check_integrity()
    assert not engine.planner.running and not engine.planner.waiting
    return out


def _attend_all(cache, layer, q, k, v, window):
    """Dense causal attention over the whole (padded) sequence."""
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    score = jnp.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    at = jnp.arange(q.shape[0])
    seen = at[None, :] <= at[:, None]
    seen &= (window <= 0) | (at[None, :] > at[:, None] - window)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(jnp.where(seen, score, -jnp.inf)), v), cache


@functools.cache
def _oracle(config: ModelConfig):
    def all_logits(model, tokens, rope_lengths):
        positions = jnp.arange(tokens.shape[0])
        hidden, _ = forward(model, config, tokens, positions, rope_lengths, _attend_all, None)
        return logits(model, config, hidden)

    return jax.jit(all_logits)


def dense_logits(config: ModelConfig, tokens, rope_lengths=None) -> np.ndarray:
    """float32 [tokens, V] of one sequence alone, computed in one piece."""
    size = config.context_length
    padded = np.zeros(size, np.int32)
    padded[: len(tokens)] = tokens
    lengths = np.full(size, len(tokens), np.int32)
    if rope_lengths is not None:
        lengths[: len(rope_lengths)] = rope_lengths
    return np.asarray(_oracle(config)(weights(config), padded, lengths))[: len(tokens)]


def greedy(config: ModelConfig, prompt, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(dense_logits(config, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def prompts(count: int, seed: int = 0, low: int = 1, high: int = 60) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    shared = draw.integers(3, 97, 40)
    out = []
    for index in range(count):
        own = draw.integers(3, 97, draw.integers(low, high))
        out.append(np.concatenate([shared, own]) if index % 2 else own)
    return out
