"""The one place where activations meet weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import matmul


def linear(x: jax.Array, w: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`x @ w + bias`, summed in float32 and returned in x's type.

    Shapes: x [T, *C], w [*C, *O], bias [*O] -> [T, *O]. Every axis of x but the first is contracted.
    """
    return project(x, w, bias).astype(x.dtype)


def project(x: jax.Array, w: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """As `linear`, but keeps the float32 sum: for the router and the vocabulary."""
    contracted = x.ndim - 1
    outputs = w.shape[contracted:]
    y = matmul(x.reshape(x.shape[0], -1), w.reshape(-1, math.prod(outputs))).reshape(x.shape[0], *outputs)
    return y if bias is None else y + bias.astype(jnp.float32)


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding. table [V, D], tokens int32 [T] -> [T, D]."""
    return table[tokens]


def unembed(x: jax.Array, table: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """As `project` with the transposed embedding: a head that is tied to it. x [R, D], table [V, D] -> float32 [R, V]."""
    y = jax.lax.dot_general(
        x, table, (((1,), (1,)), ((), ())), precision=precision(x), preferred_element_type=jnp.float32
    )
    return y if bias is None else y + bias.astype(jnp.float32)


def precision(x: jax.Array) -> jax.lax.Precision:
    """float32 models are asked for to be exact; the default on GPUs would round their factors to TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
