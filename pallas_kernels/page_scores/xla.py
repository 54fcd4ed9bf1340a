"""page_scores as two matmuls, as max(q a, q b) = min(q, 0) a + max(q, 0) b wherever a <= b."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.page_bounds import Bounds, ScaledBounds


def page_scores(
    q: jax.Array,
    bounds: Bounds,
    layer: jax.Array | int,
    page_table: jax.Array,
    kv_len: jax.Array,
    *,
    page_size: int,
    spread: float,
) -> jax.Array:
    """See `api.page_scores`."""
    del kv_len, page_size  # all columns of the table, those without a page included
    rows, q_heads, head_dim = q.shape
    kv_heads = bounds.shape[2]
    q = q.astype(jnp.float32).reshape(rows, kv_heads, q_heads // kv_heads, head_dim)
    signed = jnp.stack(factors(q, spread), axis=3)
    if isinstance(bounds, ScaledBounds):
        mine = ScaledBounds(*(a[layer, page_table] for a in bounds)).widened()
    else:
        mine = bounds[layer, page_table].astype(jnp.float32)  # [S, P, Hkv, 2, D]
    scores = jnp.einsum("shgbd,sphbd->shgp", signed, mine, precision=lax.Precision.HIGHEST)
    return scores.reshape(rows, q_heads, -1)


def factors(q: jax.Array, spread: float) -> tuple[jax.Array, jax.Array]:
    """What the minima and the maxima of a page are multiplied with."""
    negative, positive = jnp.minimum(q, 0), jnp.maximum(q, 0)
    if spread == 1:
        return negative, positive
    near, far = (1 + spread) / 2, (1 - spread) / 2
    return near * negative + far * positive, near * positive + far * negative
