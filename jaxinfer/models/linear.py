"""The one place where activations meet weights, be they plain arrays or packed ones."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.expert_mlp import expert_mlp
from pallas_kernels.matmul import matmul
from pallas_kernels.quantize import Inputs, values


class Multiplies(Protocol):
    """What stands for a matrix: a `QArray`, or what watches one while a model is calibrated."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def multiply(self, x: Inputs) -> jax.Array:
        """x [T, K] -> float32 [T, N]."""
        ...

    def expert_mlp(
        self, x: jax.Array, down: Any, ids: jax.Array, shares: jax.Array, activation: str
    ) -> jax.Array:
        """The experts' MLPs, where this is their gate_up; see `run_experts`."""
        ...


class Table(Protocol):
    """What stands for an embedding of which every device has its share, `shares.SplitTable`."""

    @property
    def array(self) -> jax.Array: ...

    def rows(self, tokens: jax.Array) -> jax.Array:
        """tokens int32 [T] -> [T, D]."""
        ...


Array = (jax.Array, np.ndarray)
Weights = jax.Array | Multiplies


def linear(x: Inputs, w: Weights, bias: jax.Array | None = None) -> jax.Array:
    """`x @ w + bias`, summed in float32 and returned in x's type. What is to be computed before, packed weights do themselves.

    Shapes: x [T, *C], w [*C, *O], bias [*O] -> [T, *O]. Every axis of x but the first is contracted.
    """
    return project(x, w, bias).astype(x.dtype)


def project(x: Inputs, w: Weights, bias: jax.Array | None = None) -> jax.Array:
    """As `linear`, but keeps the float32 sum: for the router and the vocabulary."""
    tokens = x.shape[0]
    outputs = w.shape[len(x.shape) - 1 :]
    y = matmul(*operands(x, w)) if isinstance(w, Array) else w.multiply(_flat(x))
    y = y.reshape(tokens, *outputs)
    return y if bias is None else y + bias.astype(jnp.float32)


def operands(x: Inputs, w: Any) -> tuple[Any, Any]:
    """What a kernel multiplies: matrices of two axes, or of a `QArray` w rounded rows and its packed matrix."""
    if not isinstance(w, Array):
        return w.rows(_flat(x)), w.matrix
    rows = values(x).reshape(x.shape[0], -1)
    return rows, w.reshape(rows.shape[1], -1)


def _flat(x: Inputs) -> Inputs:
    return x.reshape(x.shape[0], -1) if isinstance(x, Array) else x


def run_experts(
    x: jax.Array, gate_up: Weights, down: Weights, ids: jax.Array, shares: jax.Array, activation: str
) -> jax.Array:
    """Sum of the chosen experts' gated MLPs.

    Shapes: x [T, D], gate_up [E, D, 2, F], down [E, F, D], ids int32 [T, k] (negative: none), shares float32 [T, k] -> [T, D].
    """
    if not isinstance(gate_up, Array):
        return gate_up.expert_mlp(x, down, ids, shares, activation)
    assert isinstance(down, Array)
    count, wide, _, width = gate_up.shape
    return expert_mlp(x, gate_up.reshape(count, wide, 2 * width), down, ids, shares, activation=activation)


def embed(table: jax.Array | Table, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding. table [V, D], tokens int32 [T] -> [T, D]."""
    return table[tokens] if isinstance(table, Array) else table.rows(tokens)


def unembed(x: jax.Array, table: jax.Array | Table, bias: jax.Array | None = None) -> jax.Array:
    """As `project` with the transposed embedding: a head that is tied to it. x [R, D], table [V, D] -> float32 [R, V]."""
    table = table if isinstance(table, Array) else table.array
    y = jax.lax.dot_general(
        x, table, (((1,), (1,)), ((), ())), precision=precision(x), preferred_element_type=jnp.float32
    )
    return y if bias is None else y + bias.astype(jnp.float32)


def precision(x: jax.Array) -> jax.lax.Precision:
    """float32 models are asked for to be exact; the default on GPUs would round their factors to TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
