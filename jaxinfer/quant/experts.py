"""The MLPs of experts with packed weights: pairs of token and expert sorted by expert, then grouped matmuls."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.expert_mlp.xla import ACTIVATIONS
from pallas_kernels.int4_matmul import int4_matmul

if TYPE_CHECKING:
    from jaxinfer.quant.qarray import QArray


def expert_mlp(
    x: jax.Array, gate_up: QArray, down: QArray, ids: jax.Array, shares: jax.Array, activation: str
) -> jax.Array:
    """As `pallas_kernels.expert_mlp` with packed weights.

    x [T, D]; gate_up of shape [E, D, 2, F] and down [E, F, D]; ids int32 [T, k], negative ones are skipped; shares
    float32 [T, k] -> [T, D] in x's type. All experts take their inputs in one order, so a token is rounded once.
    """
    (tokens, chosen), experts = ids.shape, gate_up.shape[0]
    flat = jnp.where(ids < 0, experts, ids).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    group_sizes = jnp.bincount(flat, length=experts + 1)[:experts]

    rows = jax.tree.map(lambda part: part[order // chosen], gate_up.shared().rows(x))
    gate, up = jnp.split(int4_matmul(rows, gate_up.matrix, group_sizes), 2, axis=-1)
    hidden = (ACTIVATIONS[activation](gate) * up).astype(x.dtype)
    sorted_out = int4_matmul(down.shared().rows(hidden), down.matrix, group_sizes)

    pairs = jnp.zeros_like(sorted_out).at[order].set(sorted_out).reshape(tokens, chosen, -1)
    weights = jnp.where(ids < 0, 0, shares.astype(jnp.float32))
    # Term by term: a reduction may change its order with T.
    terms = (weights[:, k, None] * pairs[:, k] for k in range(chosen))
    return functools.reduce(jnp.add, terms).astype(x.dtype)
