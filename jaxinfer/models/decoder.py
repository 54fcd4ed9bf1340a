"""The decoder of all families: one forward pass over flat tokens, parameters in, hidden states and cache out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.models import rotary
from jaxinfer.models.attention import qkv
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder, Layer, Lead, MoE
from jaxinfer.models.linear import embed, linear, project, unembed
from jaxinfer.models.mlp import mlp
from jaxinfer.models.moe import Experts, moe
from jaxinfer.models.nano import NanoBatches, run_in_two
from jaxinfer.models.norms import norm, normed
from jaxinfer.quant.form import Quantization
from jaxinfer.quant.qarray import QArray, random_qarray
from pallas_kernels.quantize import values

Cache = Any
Attend = Callable[..., tuple[jax.Array, Cache]]
"""attend(cache, layer, q [T, Hq, Dh], k [T, Hkv, Dh], v [T, Hkv, Dh], window) -> (out [T, Hq, Dh], cache).

layer: int32 scalar, counted over the whole model; window: int32 scalar, tokens a query sees (itself included), 0 for all.
Queries come rotated but not scaled: scores are q.k / sqrt(Dh).
"""


class ByLayer(NamedTuple):
    """An `Attend` for each layer. Neighbours that share one are one loop, which holds no choice between them: on a GPU the host
    waits for every choice that the device makes."""

    attends: tuple[Attend | NanoBatches, ...]


class _Random:
    """Normal weights of standard deviation 0.02; every array draws from its own key."""

    def __init__(self, key: jax.Array, dtype: jnp.dtype, form: Quantization | None):
        self.key, self.dtype, self.form, self.made = key, dtype, form, 0

    def weight(self, *shape: int) -> jax.Array:
        self.made += 1
        return 0.02 * jax.random.normal(jax.random.fold_in(self.key, self.made), shape, self.dtype)

    def matrix(self, lead: Lead, inputs: Lead, outputs: Lead, *, sorts: bool = True) -> jax.Array | QArray:
        if self.form is None:
            return self.weight(*lead, *inputs, *outputs)
        self.made += 1
        key = jax.random.fold_in(self.key, self.made)
        return random_qarray(key, lead, inputs, outputs, self.form, sorts)

    def ones(self, *shape: int) -> jax.Array:
        return jnp.ones(shape, self.dtype)

    def zeros(self, *shape: int) -> jax.Array:
        return jnp.zeros(shape, self.dtype)


def init(config: ModelConfig, key: jax.Array, dtype: Any = None) -> Decoder:
    """A model of random weights, in config.dtype unless `dtype` says otherwise."""
    return Decoder(_Random(key, jnp.dtype(dtype or config.dtype), config.quantization), config)


def abstract(config: ModelConfig, dtype: Any = None) -> Decoder:
    """Shapes and types of all parameters (jax.ShapeDtypeStruct leaves): the one description of a model's arrays. `dtype` is that
    of everything that is not packed."""
    return nnx.eval_shape(lambda: init(config, jax.random.key(0), dtype))


def without_experts(model: Decoder) -> Decoder:
    """The same model, stacked, whose layers hold routers but no experts: those are somewhere else."""
    other = jax.tree.map(lambda leaf: leaf, model)
    for run in other.runs:
        if isinstance(run.mlp, MoE):
            for name in ("gate_up", "down"):
                setattr(run.mlp, name, nnx.data(None))
    return other


def unstack(model: Decoder, config: ModelConfig) -> Decoder:
    """The same model with each run a list of single layers.

    XLA on CPU copies the slice of every stacked weight that a scan visits, which makes decode 1.5-1.8 times slower;
    separate buffers are read in place.
    """
    runs = [
        nnx.List([jax.tree.map(lambda leaf, i=i: leaf[i], run) for i in range(count)])
        for run, (_, count) in zip(model.runs, config.runs)
    ]
    other = jax.tree.map(lambda leaf: leaf, model)
    other.runs = nnx.List(runs)
    return other


def forward(
    model: Decoder,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    rope_length: jax.Array,
    attend: Attend | NanoBatches | ByLayer,
    cache: Cache,
    valid: jax.Array | None = None,
    experts: Experts | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs all layers and the final norm over the flat tokens of many sequences.

    Args:
      tokens: int32 [T].
      positions: int32 [T], of each token in its sequence.
      rope_length: int32 [T], sequence length that governs each token's rotation: max(prompt length, position + 1).
      attend: writes keys and values to the cache and attends.
      cache: any pytree; carried through the layers.
      valid: bool [T], False for padding; None if all tokens are real.
      experts: computes the experts of a layer; None if the model holds their weights.

    Returns:
      hidden [T, D] in the parameters' type, and the cache.
    """
    angles = rotary.angles(config.rope, positions, rope_length)
    hidden = embed(model.embed, tokens)
    attends = attend.attends if isinstance(attend, ByLayer) else (attend,) * config.layers
    windows = np.asarray(config.windows, np.int32)

    def apply(own: Attend | NanoBatches, layer: Layer, index, window, carry):
        hidden, cache = carry
        return run_layer(hidden, cache, layer, config, angles, own, index, window, valid, experts)

    def step(own: Attend | NanoBatches, run: Layer, first: int, carry, index: jax.Array):
        layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index - first, keepdims=False), run)
        return apply(own, layer, index, jnp.asarray(windows)[index], carry), None

    carry, first = (hidden, cache), 0
    for run, (_, count) in zip(model.runs, config.runs):
        if isinstance(run, nnx.List):
            for index, layer in enumerate(run, first):
                carry = apply(attends[index], layer, np.int32(index), windows[index], carry)
        else:
            for own, indices in _stretches(attends, first, first + count):
                carry, _ = jax.lax.scan(functools.partial(step, own, run, first), carry, indices)
        first += count
    hidden, cache = carry
    return norm(hidden, model.norm, config), cache


def _stretches(
    attends: tuple[Attend | NanoBatches, ...], begin: int, end: int
) -> Iterator[tuple[Attend | NanoBatches, np.ndarray]]:
    """Neighbours from `begin` to `end` that attend alike, as int32 indices."""
    for _, found in itertools.groupby(range(begin, end), key=lambda index: id(attends[index])):
        indices = np.asarray(list(found), np.int32)
        yield attends[indices[0]], indices


def logits(model: Decoder, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Scores of every vocabulary entry. hidden [R, D] -> float32 [R, V]."""
    if model.head is None:
        return unembed(hidden, model.embed, model.head_bias)
    return project(hidden, model.head, model.head_bias)


def run_layer(
    hidden: jax.Array,
    cache: Cache,
    layer: Layer,
    config: ModelConfig,
    angles: rotary.Angles,
    attend: Attend | NanoBatches,
    index: jax.Array | int,
    window: jax.Array,
    valid: jax.Array | None = None,
    experts: Experts | None = None,
) -> tuple[jax.Array, Cache]:
    """One layer over flat tokens. hidden [T, D]; index and window are `attend`'s; the rest as in `forward`."""
    if isinstance(attend, NanoBatches):
        return run_in_two(hidden, cache, layer, config, angles, attend, index, window)
    q, k, v = qkv(normed(hidden, layer.attn_norm, config), layer.attention, config, angles)
    attended, cache = attend(cache, index, q, k, v, window)
    hidden = hidden + linear(attended.astype(hidden.dtype), layer.attention.out, layer.attention.out_bias)
    x = normed(hidden, layer.mlp_norm, config)
    if isinstance(layer.mlp, MoE):
        out, cache = moe(values(x), layer.mlp, config, valid, index, experts, cache)
        return hidden + out, cache
    return hidden + mlp(x, layer.mlp, config.activation), cache
