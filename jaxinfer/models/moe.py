"""The mixture-of-experts block: which experts a token visits, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.models.config import ModelConfig, MoEConfig
from jaxinfer.models.layers import MoE
from jaxinfer.models.linear import project, run_experts

Experts = Callable[..., tuple[jax.Array, Any]]
"""experts(cache, layer, x [T, D], ids int32 [T, K], shares float32 [T, K]) -> (out [T, D], cache): the sum of the chosen experts'
MLPs, each times its share. layer: int32 scalar, counted over the whole model; a negative id is no expert; cache: what is
carried through the layers.
"""


def moe(
    x: jax.Array,
    weights: MoE,
    config: ModelConfig,
    valid: jax.Array | None,
    layer: jax.Array | int = 0,
    experts: Experts | None = None,
    cache: Any = None,
) -> tuple[jax.Array, Any]:
    """Sum of the chosen experts' MLPs. x [T, D], valid bool [T] (False: padding, visits no expert) -> [T, D], cache.

    experts: computes them wherever their weights are; None where `weights` holds them.
    """
    assert config.moe is not None
    ids, shares = route(project(x, weights.router), config.moe)
    if valid is not None:
        ids = jnp.where(valid[:, None], ids, -1)
    if experts is not None:
        return experts(cache, layer, x, ids, shares)
    return run_experts(x, weights.gate_up, weights.down, ids, shares, config.activation), cache


def route(scores: jax.Array, config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Chosen experts and their weights. scores float32 [T, E] -> ids int32 [T, K], weights float32 [T, K]."""
    if config.router == "sparsemixer":
        return _sparsemixer(scores, config.router_jitter)
    shares, ids = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), config.experts_per_token)
    if config.renormalize:
        shares = shares / shares.sum(-1, keepdims=True)
    return ids.astype(jnp.int32), shares


def _sparsemixer(scores: jax.Array, jitter: float) -> tuple[jax.Array, jax.Array]:
    """SparseMixer-v2 at inference (arXiv:2409.12136): each of the two experts is weighed against those whose score is
    within 2 * jitter of its own, relatively; the second never against the first."""
    first = jnp.argmax(scores, axis=-1)
    rest = jnp.where(jax.nn.one_hot(first, scores.shape[-1], dtype=bool), -jnp.inf, scores)
    second = jnp.argmax(rest, axis=-1)
    shares = (_share(scores, scores, jitter), _share(rest, scores, jitter))
    return jnp.stack((first, second), -1).astype(jnp.int32), jnp.stack(shares, -1)


def _share(candidates: jax.Array, scores: jax.Array, jitter: float) -> jax.Array:
    """Softmax weight of the best candidate among its close rivals. [T, E] -> [T]."""
    best = candidates.max(-1, keepdims=True)
    far = (best - scores) / jnp.maximum(jnp.abs(scores), best) > 2 * jitter
    return jax.nn.softmax(jnp.where(far, -jnp.inf, candidates), axis=-1).max(-1)
