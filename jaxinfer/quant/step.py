"""One layer over one window of calibration text, plain or watched."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models import rotary
from jaxinfer.models.attention import qkv
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import run_layer
from jaxinfer.models.layers import Layer
from jaxinfer.models.norms import normed
from jaxinfer.quant.form import Quantization
from jaxinfer.quant.watch import watch

Orders = dict[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """Runs one layer over one window of text, dense and causal, in float32. Equal steps share what is compiled."""

    config: ModelConfig
    length: int

    @property
    def angles(self) -> rotary.Angles:
        return rotary.angles(self.config.rope, jnp.arange(self.length), jnp.full(self.length, self.length))

    def statistics(self, layer: Layer, x: np.ndarray, index: int) -> dict[str, jax.Array]:
        return self._noting(layer, x, self.config.windows[index], {}, None)

    def moments(
        self, layer: Layer, x: np.ndarray, index: int, orders: Orders, form: Quantization
    ) -> dict[str, jax.Array]:
        return self._noting(layer, x, self.config.windows[index], orders, form)

    def run(self, layer: Layer, x: np.ndarray, index: int) -> np.ndarray:
        return np.asarray(self._running(layer, x, self.config.windows[index]))

    @functools.partial(jax.jit, static_argnames=("self",))
    def keys(self, layer: Layer, x: np.ndarray) -> jax.Array:
        """As they are stored: rotated, [T, Hkv, Dh]."""
        hidden = normed(jnp.asarray(x), layer.attn_norm, self.config)
        return qkv(hidden, layer.attention, self.config, self.angles)[1]

    @functools.partial(jax.jit, static_argnames=("self", "form"))
    def _noting(self, layer, x, window, orders, form):
        watched, noted = watch(layer, orders, form)
        self._layer(watched, x, window)
        return noted

    @functools.partial(jax.jit, static_argnames=("self",))
    def _running(self, layer, x, window):
        return self._layer(layer, x, window)

    def _layer(self, layer: Layer, x: jax.Array, window: jax.Array) -> jax.Array:
        hidden, _ = run_layer(x, None, layer, self.config, self.angles, attend_causally, 0, window)
        return hidden


def attend_causally(cache, layer, q, k, v, window):
    """Causal attention of one window over itself, one KV head at a time."""
    tokens, _, dim = q.shape
    at = jnp.arange(tokens)
    back = at[:, None] - at[None, :]
    seen = (back >= 0) & ((window == 0) | (back < window))

    def one(head):
        mine, keys, values = head  # [T, G, Dh], [T, Dh], [T, Dh]
        scores = jnp.einsum("tgd,sd->gts", mine, keys) / math.sqrt(dim)
        return jnp.einsum("gts,sd->tgd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), values)

    grouped = q.reshape(tokens, k.shape[1], -1, dim).swapaxes(0, 1)
    out = jax.lax.map(one, (grouped, k.swapaxes(0, 1), v.swapaxes(0, 1)))
    return out.swapaxes(0, 1).reshape(q.shape), cache
