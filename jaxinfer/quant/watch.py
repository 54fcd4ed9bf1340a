"""Stand-ins for weights that note what comes in while a layer runs, and multiply as the weights do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.layers import Layer
from jaxinfer.quant.form import Quantization
from jaxinfer.quant.qarray import quantize_rows
from pallas_kernels.expert_mlp.xla import ACTIVATIONS, grouped_matmul
from pallas_kernels.quantize import Inputs, values

Noted = dict[str, jax.Array]


class Watch:
    """Notes the second moments of a matrix's inputs.

    Without a form: the sums of squares and of magnitudes of every channel, [2, K]. With one: X^T X [K, K] of the
    inputs as they are rounded, in the order given, which then also are what is multiplied. Of experts: [E, ...], each
    by the tokens that it receives.
    """

    def __init__(self, name: str, weights: Any, order: Any, form: Quantization | None, noted: Noted):
        self.name, self.weights, self.order, self.form, self.noted = name, weights, order, form, noted

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape

    def multiply(self, x: Inputs) -> jax.Array:
        """x [T, K] -> float32 [T, N]."""
        x = self._rounded(values(x))
        self.noted[self.name] = self._moments(x)
        return _dot(x, self._matrix(self.weights.reshape(x.shape[1], -1)))

    def expert_mlp(
        self, x: jax.Array, down: Watch, ids: jax.Array, shares: jax.Array, activation: str
    ) -> jax.Array:
        """See `jaxinfer.models.linear.run_experts`."""
        experts, chosen = self.shape[0], ids.shape[1]
        order = jnp.argsort(ids.reshape(-1), stable=True)
        sizes = jnp.bincount(ids.reshape(-1), length=experts)
        of_pair = ids.reshape(-1)[order]
        x = self._rounded(x)[order // chosen]
        self.noted[self.name] = self._moments_by_expert(x, of_pair)
        matrices = self.weights.reshape(experts, x.shape[1], -1)
        gate, up = jnp.split(grouped_matmul(x, jax.vmap(self._matrix)(matrices), sizes), 2, axis=-1)
        hidden = down._rounded(ACTIVATIONS[activation](gate) * up)
        self.noted[down.name] = down._moments_by_expert(hidden, of_pair)
        out = grouped_matmul(hidden, jax.vmap(down._matrix)(down.weights), sizes)
        pairs = jnp.zeros_like(out).at[order].set(out).reshape(len(ids), chosen, -1)
        return (pairs * shares[..., None]).sum(1)

    def _rounded(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x if self.form is None else quantize_rows(x, self.order, self.form).values()

    def _matrix(self, weights: jax.Array) -> jax.Array:
        """[K, N] for inputs as `_rounded` gives them."""
        return weights if self.order is None else weights[self.order]

    def _moments(self, x: jax.Array) -> jax.Array:
        if self.form is None:
            return jnp.stack((jnp.square(x).sum(0), jnp.abs(x).sum(0)))
        return _dot(x.T, x)

    def _moments_by_expert(self, x: jax.Array, of_pair: jax.Array) -> jax.Array:
        experts = jnp.arange(self.shape[0])
        return jax.lax.map(lambda e: self._moments(jnp.where((of_pair == e)[:, None], x, 0)), experts)


def watch(layer: Layer, orders: dict[str, Any], form: Quantization | None) -> tuple[Layer, Noted]:
    """A copy of a layer whose linear weights are watched, and where they note what they see, by `MATRICES`.

    Args:
      layer: one layer of plain weights, arranged as `calibrate.arrange` does where `form` is given.
      orders: of the inputs, by name; absent where they come in order.
    """
    noted: Noted = {}
    watched = jax.tree.map(lambda leaf: leaf, layer)
    for name in MATRICES:
        part, leaf = name.split(".")
        block = getattr(watched, part)
        weights = getattr(block, leaf)
        setattr(block, leaf, nnx.static(Watch(name, weights, orders.get(name), form, noted)))
    return watched, noted


MATRICES = {"attention.qkv": 1, "attention.out": 2, "mlp.gate_up": 1, "mlp.down": 1}
"""The linear layers of a decoder layer, and how many axes of their weights are contracted."""


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
