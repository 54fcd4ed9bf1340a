"""How likely a model finds text, and whether greedy answers are right, with keys and values as a cache would give them back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models import forward, logits, rotary
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder
from jaxinfer.quant.step import attend_causally
from pallas_kernels.packed_pages import pack, unpack


@dataclass(frozen=True)
class Cache:
    """What keys and values go through before they are attended to.

    Attributes:
      bits: 4 or 8, as in `pallas_kernels.packed_pages`; 0 leaves them as they are.
      before_rope: keys are rounded before they are rotated, as Atom does, not after.
    """

    bits: int = 0
    before_rope: bool = False


AS_IT_IS = Cache()


def window_logits(config: ModelConfig, model: Decoder, ids: jax.Array, cache: Cache = AS_IT_IS) -> jax.Array:
    """Of one window by itself. ids [T] -> float32 [T, V]."""
    at, length = jnp.arange(len(ids)), jnp.full(len(ids), len(ids))
    angles = rotary.angles(config.rope, at, length)
    squares = jnp.square(angles.cos) + jnp.square(angles.sin)
    back = rotary.Angles(angles.cos / squares, -angles.sin / squares)

    def rounded(x):
        return unpack(*pack(x, cache.bits), cache.bits)

    def attend(carried, layer, q, k, v, window):
        if cache.bits and cache.before_rope:
            k = rotary.rotate(rounded(rotary.rotate(k, back)), angles)
        elif cache.bits:
            k = rounded(k)
        if cache.bits:
            v = rounded(v)
        return attend_causally(carried, layer, q, k, v, window)

    hidden, _ = forward(model, config, ids, at, length, attend, None)
    return logits(model, config, hidden)


def perplexity(config: ModelConfig, model: Decoder, judged: np.ndarray, cache: Cache = AS_IT_IS) -> float:
    """Of windows int32 [n, T] that do not overlap, each by itself: exp of the mean negative log-likelihood of all tokens but
    a window's first."""

    @jax.jit
    def total(model: Decoder, ids: jax.Array) -> jax.Array:
        every = jax.nn.log_softmax(window_logits(config, model, ids, cache))
        return -jnp.take_along_axis(every[:-1], ids[1:, None], axis=1).sum()

    return math.exp(sum(float(total(model, ids)) for ids in judged) / (judged.size - len(judged)))


def greedy_share(
    config: ModelConfig, model: Decoder, asked: list[tuple[list[int], list[int]]], length: int, cache: Cache
) -> float:
    """Share of (prompt, answer) whose answer greedy decoding gives: every token the likeliest after those before it."""
    likeliest = jax.jit(lambda model, ids: window_logits(config, model, ids, cache).argmax(-1))
    right = 0
    for prompt, answer in asked:
        ids = np.zeros(length, np.int32)
        both = (prompt + answer)[:length]
        ids[: len(both)] = both
        said = np.asarray(likeliest(model, ids))[len(prompt) - 1 : len(both) - 1]
        right += bool((said == both[len(prompt) :]).all())
    return right / len(asked)
