"""packed_experts by unpacking the expert of one block of rows at a time."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.expert_mlp.xla import ACTIVATIONS, grouped_matmul_by
from pallas_kernels.packed_experts.layout import SMALL_TILE, TILE, Record


def packed_experts(
    x: jax.Array,
    records: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    record: Record,
    activation: str,
) -> jax.Array:
    """See `api.packed_experts`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"packed_experts: unknown activation {activation!r}; one of {sorted(ACTIVATIONS)}")
    tokens, top_k = expert_ids.shape
    experts, wide, width = records.shape[0], record.model_dim, record.hidden_dim
    flat = jnp.where(expert_ids < 0, experts, expert_ids).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    group_sizes = jnp.bincount(flat, length=experts + 1)[:experts]

    def matrix(expert, parts):
        stored = lax.dynamic_index_in_dim(records, expert, keepdims=False)
        return jnp.concatenate([unpack(stored, record, part) for part in parts], axis=1)

    rows = x[order // top_k].astype(jnp.float32)
    gate_up = grouped_matmul_by(rows, lambda e: matrix(e, ("gate", "up")), 2 * width, group_sizes)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    hidden = ACTIVATIONS[activation](gate) * up
    sorted_out = grouped_matmul_by(hidden, lambda e: matrix(e, ("down",)), wide, group_sizes)

    pairs = jnp.zeros_like(sorted_out).at[order].set(sorted_out).reshape(tokens, top_k, -1)
    weights = jnp.where(expert_ids < 0, 0, expert_weights.astype(jnp.float32))
    # Term by term: a reduction may change its order with T.
    terms = (weights[:, k, None] * pairs[:, k] for k in range(top_k))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def unpack(stored: jax.Array, record: Record, part: str) -> jax.Array:
    """One matrix of a record, "gate" or "up" [D, F] or "down" [F, D], as float32. stored: uint8 [record.nbytes]"""
    wide, width = record.model_dim, record.hidden_dim
    gate, up, scales, down, down_scales = record.offsets
    begin = {"gate": gate, "up": up, "down": down}[part]
    rows, columns = (width, wide) if part == "down" else (wide, width)
    count = rows * columns * record.bits // 8
    weights = _untiled(_lines(stored[begin : begin + count], record.bits), columns)
    if record.bits == 4:
        weights = (
            jnp.stack([weights << 4, weights], axis=1).reshape(rows, columns) >> 4
        )  # signs follow the high bit
    weights = weights.astype(jnp.float32)
    if not record.scaled:
        return weights
    first, end, width_of_scales = (
        (down_scales, record.nbytes, columns) if part == "down" else (scales, down, 2 * columns)
    )
    factors = lax.bitcast_convert_type(stored[first:end].reshape(-1, 4), jnp.float32)
    factors = factors.reshape(-1, width_of_scales)
    factors = factors[:, columns:] if part == "up" else factors[:, :columns]
    return weights * jnp.repeat(factors, record.group, axis=0)[:rows]


def _lines(stored: jax.Array, bits: int) -> jax.Array:
    """Bytes as elements: float32, bfloat16, or int8 (which holds two nibbles where bits is 4)."""
    if bits <= 8:
        return lax.bitcast_convert_type(stored, jnp.int8)
    dtype = jnp.float32 if bits == 32 else jnp.bfloat16
    return lax.bitcast_convert_type(stored.reshape(-1, bits // 8), dtype)


def _untiled(flat: jax.Array, columns: int) -> jax.Array:
    """Tiles one after another -> [lines, columns]"""
    lines = flat.shape[0] // columns
    whole = columns // TILE * TILE
    parts = []
    for tiles, width, count in (
        (flat[: lines * whole], TILE, whole),
        (flat[lines * whole :], SMALL_TILE, columns - whole),
    ):
        parts.append(tiles.reshape(count // width, lines, width).swapaxes(0, 1).reshape(lines, count))
    return jnp.concatenate(parts, axis=1)
