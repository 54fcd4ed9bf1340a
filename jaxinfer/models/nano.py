"""A layer in two nano-batches: the attention of one runs beside the widest product of the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.models import rotary
from jaxinfer.models.attention import qkv
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import MLP, Layer
from jaxinfer.models.linear import linear
from jaxinfer.models.mlp import gated_down
from jaxinfer.models.norms import normed


class NanoBatches(NamedTuple):
    """An `Attend` for tokens of which the `first` are one nano-batch and the rest [R] another.

    attend(cache, layer, q, k, v, window) -> ((out [R, Hq, Dh] of the rest, beside), cache), and then
    beside(x, w) -> (x @ w as `linear` gives it, out [first, Hq, Dh] of the first).
    """

    first: int
    attend: Callable[..., tuple[Any, Any]]


def splits(config: ModelConfig) -> bool:
    """Whether the model's layers can run so: each has one wide product, and no window."""
    return not (any(config.moe_layers) or any(config.windows))


def run_in_two(
    hidden: jax.Array,
    cache: Any,
    layer: Layer,
    config: ModelConfig,
    angles: rotary.Angles,
    nano: NanoBatches,
    index: jax.Array | int,
    window: jax.Array,
) -> tuple[jax.Array, Any]:
    """As `run_layer`. The output projection and gate_up are read once for each nano-batch, all else once for both.

    What decodes waits for its attention, which waits for memory. What prefills has its attention first and then computes
    gate_up, more than half of a layer's operations, meanwhile.
    """
    weights = layer.mlp
    assert isinstance(weights, MLP)
    q, k, v = qkv(normed(hidden, layer.attn_norm, config), layer.attention, config, angles)
    (attended, beside), cache = nano.attend(cache, index, q, k, v, window)

    def after_attention(before: jax.Array, attended: jax.Array) -> jax.Array:
        out = layer.attention.out
        return before + linear(attended.astype(before.dtype), out, layer.attention.out_bias)

    rest = after_attention(hidden[nano.first :], attended)
    gate_up, attended = beside(normed(rest, layer.mlp_norm, config), weights.gate_up)
    if weights.gate_up_bias is not None:
        gate_up = gate_up + weights.gate_up_bias.astype(gate_up.dtype)
    first = after_attention(hidden[: nano.first], attended)
    firsts = linear(normed(first, layer.mlp_norm, config), weights.gate_up, weights.gate_up_bias)
    both = jnp.concatenate([firsts, gate_up])
    return jnp.concatenate([first, rest]) + gated_down(both, weights, config.activation), cache
