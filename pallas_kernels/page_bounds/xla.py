"""page_bounds as scatters: the reference, and the path of machines without a kernel."""

import jax
import jax.numpy as jnp


def page_bounds(
    bounds: jax.Array, layer: jax.Array | int, k: jax.Array, slots: jax.Array, *, page_size: int
) -> jax.Array:
    """See `api.page_bounds`."""
    pages = bounds.shape[1]
    k = k.astype(bounds.dtype)
    # An index past the end is dropped by the scatter; a negative one would count from the back.
    page_id = jnp.where(slots < 0, pages, slots // page_size)
    begun = jnp.where(slots % page_size == 0, page_id, pages)
    nothing_yet = jnp.array([jnp.inf, -jnp.inf], bounds.dtype)[:, None]
    bounds = bounds.at[layer, begun].set(nothing_yet, mode="drop")
    bounds = bounds.at[layer, page_id, :, 0].min(k, mode="drop")
    return bounds.at[layer, page_id, :, 1].max(k, mode="drop")
