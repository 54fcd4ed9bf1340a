"""expert_mlp by sorting the (token, expert) pairs and multiplying blocks of rows of one expert each (MegaBlocks)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def expert_mlp(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """See `api.expert_mlp`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"expert_mlp: unknown activation {activation!r}; one of {sorted(ACTIVATIONS)}")
    tokens, top_k = expert_ids.shape
    experts = gate_up.shape[0]
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(jnp.where(flat < 0, experts, flat), stable=True)
    group_sizes = jnp.bincount(jnp.where(flat < 0, experts, flat), length=experts + 1)[:experts]

    gate, up = jnp.split(grouped_matmul(x[order // top_k], gate_up, group_sizes), 2, axis=-1)
    hidden = (ACTIVATIONS[activation](gate) * up).astype(x.dtype)
    sorted_out = grouped_matmul(hidden, down, group_sizes)

    pairs = jnp.zeros_like(sorted_out).at[order].set(sorted_out).reshape(tokens, top_k, -1)
    weights = jnp.where(expert_ids < 0, 0, expert_weights.astype(jnp.float32))
    # Term by term: a reduction may change its order with T.
    terms = (weights[:, k, None] * pairs[:, k] for k in range(top_k))
    out = functools.reduce(jnp.add, terms)
    return out.astype(x.dtype)


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Rows of x, sorted by group, times the matrix of their group.

    x: [R, K]; w: [E, K, N]; group_sizes: int32 [E], their sum at most R
    returns float32 [R, N], zeros in the rows past the last group
    """
    return grouped_matmul_by(
        x, lambda e: lax.dynamic_index_in_dim(w, e, keepdims=False), w.shape[2], group_sizes
    )


def grouped_matmul_by(
    x: jax.Array, matrix: Callable[[jax.Array], jax.Array], columns: int, group_sizes: jax.Array
) -> jax.Array:
    """The same where `matrix` gives the [K, columns] of a group by its number, an int32 scalar."""
    rows, experts = x.shape[0], group_sizes.shape[0]
    block = _block_rows(rows, experts)
    ends = jnp.cumsum(group_sizes)
    block_ends = jnp.cumsum(-(-group_sizes // block))
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def one_block(b, out):
        e = jnp.searchsorted(block_ends, b, side="right")
        blocks_before = jnp.where(e > 0, block_ends[e - 1], 0)
        start = ends[e] - group_sizes[e] + (b - blocks_before) * block
        part = jnp.dot(
            lax.dynamic_slice_in_dim(padded, start, block),
            matrix(e),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        # Rows past the end of the group are the next group's, whose own block comes later and overwrites them.
        return lax.dynamic_update_slice_in_dim(out, part, start, 0)

    out = jnp.zeros((rows + block, columns), jnp.float32)
    out = lax.fori_loop(0, block_ends[-1], one_block, out)[:rows]
    return jnp.where((jnp.arange(rows) < ends[-1])[:, None], out, 0)


def _block_rows(rows: int, experts: int) -> int:
    """A power of two near the mean group, so that padding costs about as much as the mean group at most."""
    mean = max(1, rows // experts)
    return min(256, max(8, 1 << (mean - 1).bit_length()))
