"""What comes right before a low-bit matmul, not yet computed, so that a kernel can do it on the way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["x", "scale"], meta_fields=["eps"])
@dataclass(frozen=True)
class Normed:
    """x [M, K] after a root-mean-square norm with scale [K], in x's type."""

    x: jax.Array
    scale: jax.Array
    eps: float = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self):
        return self.x.dtype

    def values(self) -> jax.Array:
        """[M, K]"""
        wide = self.x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * self.scale.astype(jnp.float32)).astype(self.x.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["gate_up"], meta_fields=["activation"])
@dataclass(frozen=True)
class Gated:
    """activation(gate) * up of gate_up [M, 2, K], in its type."""

    gate_up: jax.Array
    activation: Callable[[jax.Array], jax.Array] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.gate_up.shape[0], self.gate_up.shape[2]

    @property
    def dtype(self):
        return self.gate_up.dtype

    def values(self) -> jax.Array:
        """[M, K]"""
        gate, up = (self.gate_up[:, part].astype(jnp.float32) for part in (0, 1))
        return (self.activation(gate) * up).astype(self.gate_up.dtype)


Inputs = jax.Array | Normed | Gated


def values(x: Inputs) -> jax.Array:
    """The plain array."""
    return x.values() if isinstance(x, Normed | Gated) else x
