"""page_bounds for Hopper: one warpgroup folds a page's new keys of one KV head into its bounds, in place.

Bytes for bfloat16: 8 * D per page written and KV head, to read and write its bounds, and 10 * D per new key, where 2 * D
would do: keys are first laid out twice, so that both bounds are one vector. A decoding row writes one key a step:
18 * D bytes, 1 / 450 of what page_scores reads at 32K tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors
from pallas_kernels.page_bounds.xla import around


def page_bounds(
    bounds: jax.Array, layer: jax.Array | int, k: jax.Array, slots: jax.Array, *, page_size: int
) -> jax.Array:
    """See `api.page_bounds`."""
    layers, pages, kv_heads, _, head_dim = bounds.shape
    tokens = k.shape[0]
    processors()
    if bounds.dtype != jnp.bfloat16 or head_dim not in (64, 128):
        raise NotImplementedError(f"bounds of {bounds.dtype}, head dimension {head_dim}; bfloat16, 64 or 128")
    slots = slots.astype(jnp.int32)
    page = jnp.where(slots < 0, -1, slots // page_size)
    run = _runs(page, page_size)
    begun = (slots % page_size == 0).astype(jnp.int32)
    entry = (jnp.maximum(page, 0) + jnp.asarray(layer, jnp.int32) * pages) * kv_heads
    new = around(k, bounds.dtype).reshape(tokens, kv_heads, 2 * head_dim)
    sign = jnp.repeat(jnp.array([1, -1], bounds.dtype), head_dim)
    kernel = plgpu.kernel(
        _fold_run,
        grid=(tokens, kv_heads),
        grid_names=("token", "head"),
        kernel_name="page_bounds",
    )
    state = jax.new_ref(bounds.reshape(layers * pages * kv_heads, 2 * head_dim))
    kernel(state, run, begun, entry, new, sign)
    return jax.freeze(state).reshape(bounds.shape)


def _runs(page, page_size):
    """[T]: for the first token of each page how many follow in it, itself included; 0 for the others."""
    first = (page >= 0) & (page != jnp.pad(page[:-1], (1, 0), constant_values=-1))
    following = jnp.pad(page, (0, page_size), constant_values=-1)
    same = sum((following[i : i + len(page)] == page).astype(jnp.int32) for i in range(page_size))
    return jnp.where(first, same, 0)


def _fold_run(bounds, run, begun, entry, k, sign):
    token, head = lax.axis_index("token"), lax.axis_index("head")
    count = run[token]

    @pl.when(count > 0)
    def _():
        at, flip = entry[token] + head, sign[...]
        # Minimum and negated maximum, so that both are minima.
        new = k[token, head] * flip
        anew = lax.broadcast(begun[token] > 0, new.shape)
        low = jnp.where(anew, new, jnp.minimum(new, bounds[at] * flip))
        low = lax.fori_loop(1, count, lambda i, low: jnp.minimum(low, k[token + i, head] * flip), low)
        bounds[at] = low * flip
