"""page_select by top_k: the reference, and the path of machines without a kernel."""

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST, LOWEST = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min


def page_select(
    scores: jax.Array,
    pages: jax.Array,
    keep: jax.Array,
    *,
    width: int,
    first: int,
    last: int,
    scale: float,
    top_p: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.page_select`."""
    total = scores.shape[3]
    index, own = jnp.arange(total), pages[:, None, None]
    valid = index < own  # [S, 1, P]
    forced = valid & ((index < first) | (index >= own - last))
    ranks = rank(scores, valid, scale)
    keys = jnp.where(forced, HIGHEST, jnp.where(valid, ordered(ranks), LOWEST))
    _, best = lax.top_k(keys, width)  # of equal keys the lower index first
    count = jnp.broadcast_to(jnp.minimum(keep, pages)[:, None], keys.shape[:2])
    if top_p < 1:
        shares = jnp.where(valid, ranks if scores.shape[2] > 1 else ranks * scale, -jnp.inf)
        weights = jnp.where(valid, jnp.exp(shares - shares.max(-1, keepdims=True)), 0)
        count = _adaptive(weights, best, count, pages[:, None], first + last + 1, top_p)
    chosen = jnp.where(jnp.arange(width) < count[..., None], best, total)
    return jnp.minimum(jnp.sort(chosen, axis=-1), total - 1), count


def rank(scores: jax.Array, valid: jax.Array, scale: float) -> jax.Array:
    """Scores of each group as one: [S, H, G, P] -> [S, H, P]."""
    if scores.shape[2] == 1:
        return scores[:, :, 0]
    shares = jnp.where(valid[:, :, None], scores * scale, -jnp.inf)
    shares = shares - jax.nn.logsumexp(shares, axis=-1, keepdims=True)
    return shares.max(axis=2)


def ordered(x: jax.Array) -> jax.Array:
    """float32 as int32 of the same order: negative numbers count down from their sign bit."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 is no less than 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _adaptive(weights, best, count, pages, least, top_p):
    """How many of the best pages, in order, hold the share top_p of all weight."""
    in_order = jnp.take_along_axis(weights, best, axis=-1)
    before = jnp.cumsum(in_order, axis=-1) - in_order
    enough = jnp.sum(before < top_p * weights.sum(-1, keepdims=True), axis=-1)
    return jnp.where(pages > count, jnp.clip(enough, jnp.minimum(least, count), count), count)
