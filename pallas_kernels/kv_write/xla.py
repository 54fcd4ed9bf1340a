"""kv_write as a scatter: the reference, and the path of machines without a kernel."""

import jax
import jax.numpy as jnp


def kv_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: jax.Array | int,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See `api.kv_write`."""
    _, pages, _, page_size, _ = k_pages.shape
    # An index past the end is dropped by the scatter; a negative one would count from the back.
    page_id = jnp.where(slots < 0, pages, slots // page_size)
    offset = slots % page_size

    def write(pool, new):
        return pool.at[layer, page_id, :, offset].set(new.astype(pool.dtype), mode="drop")

    return write(k_pages, k), write(v_pages, v)
