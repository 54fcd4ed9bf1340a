"""page_bounds for Hopper: one warpgroup folds a page's new keys of one KV head into its bounds, in place.

Bytes for bfloat16: 8 * D per page written and KV head, to read and write its bounds, and 10 * D per new key, where 2 * D
would do: keys are first laid out twice, so that both bounds are one vector. A decoding row writes one key a step:
18 * D bytes, 1 / 450 of what page_scores reads at 32K tokens. In eight bits it is 4 * D and the scale in place of 8 * D.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors
from pallas_kernels.page_bounds.scaled import Bounds, ScaledBounds, scale_for
from pallas_kernels.page_bounds.xla import around


def page_bounds(
    bounds: Bounds, layer: jax.Array | int, k: jax.Array, slots: jax.Array, *, page_size: int
) -> Bounds:
    """See `api.page_bounds`."""
    layers, pages, kv_heads, _, head_dim = bounds.shape
    tokens = k.shape[0]
    processors()
    if bounds.dtype not in (jnp.bfloat16, jnp.int8) or head_dim not in (64, 128):
        raise NotImplementedError(
            f"bounds of {bounds.dtype}, head dimension {head_dim}; bfloat16 or int8, 64 or 128"
        )
    slots = slots.astype(jnp.int32)
    page = jnp.where(slots < 0, -1, slots // page_size)
    run = _runs(page, page_size)
    begun = (slots % page_size == 0).astype(jnp.int32)
    entry = (jnp.maximum(page, 0) + jnp.asarray(layer, jnp.int32) * pages) * kv_heads
    sign = jnp.repeat(jnp.array([1, -1], jnp.float32), head_dim)
    flat = (layers * pages * kv_heads, 2 * head_dim)

    def fold(kernel, states, new):
        call = plgpu.kernel(
            kernel, grid=(tokens, kv_heads), grid_names=("token", "head"), kernel_name="page_bounds"
        )
        new = new.reshape(tokens, kv_heads, 2 * head_dim)
        call(*states, run, begun, entry, new, sign.astype(new.dtype))
        return [jax.freeze(state) for state in states]

    if isinstance(bounds, ScaledBounds):
        states = [jax.new_ref(bounds.values.reshape(flat)), jax.new_ref(bounds.scales.reshape(-1))]
        values, scales = fold(_fold_run_scaled, states, around(k.astype(jnp.float32), jnp.float32))
        return ScaledBounds(values.reshape(bounds.shape), scales.reshape(bounds.scales.shape))
    (state,) = fold(_fold_run, [jax.new_ref(bounds.reshape(flat))], around(k, bounds.dtype))
    return state.reshape(bounds.shape)


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


def _fold_run_scaled(values, scales, run, begun, entry, k, sign):
    token, head = lax.axis_index("token"), lax.axis_index("head")
    count = run[token]

    @pl.when(count > 0)
    def _():
        at, flip = entry[token] + head, sign[...]
        low = k[token, head] * flip  # both bounds as minima
        low = lax.fori_loop(1, count, lambda i, low: jnp.minimum(low, k[token + i, head] * flip), low)
        anew = lax.broadcast(begun[token] > 0, low.shape)
        before = lax.broadcast(scales[at], low.shape)
        wanted = scale_for(lax.broadcast(jnp.max(jnp.abs(low)), low.shape))
        scale = jnp.where(anew, wanted, jnp.maximum(wanted, before))
        held = values[at].astype(jnp.float32) * flip
        low = _floor(low / scale)
        low = jnp.where(anew, low, jnp.minimum(low, _floor(held * (before / scale))))
        values[at] = (low * flip).astype(jnp.int8)
        scales[at] = jnp.max(scale)


def _floor(x):
    """Mosaic lowers no floor."""
    cut = x.astype(jnp.int32).astype(jnp.float32)
    return jnp.where(cut > x, cut - 1, cut)
