"""The gated MLP and its activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax

from jaxinfer.models.layers import MLP
from jaxinfer.models.linear import linear
from pallas_kernels.quantize import Gated, Inputs

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
    }
)


def mlp(x: Inputs, weights: MLP, activation: str) -> jax.Array:
    """`down(activation(gate(x)) * up(x))`. x [T, D] -> [T, D]."""
    return gated_down(linear(x, weights.gate_up, weights.gate_up_bias), weights, activation)


def gated_down(gate_up: jax.Array, weights: MLP, activation: str) -> jax.Array:
    """The second half of `mlp`. gate_up [T, 2, F] -> [T, D]."""
    return linear(Gated(gate_up, ACTIVATIONS[activation]), weights.down, weights.down_bias)
