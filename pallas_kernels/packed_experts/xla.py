"""packed_experts by unpacking the expert of one block of rows at a time."""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.expert_mlp.xla import ACTIVATIONS, grouped_matmul_by
from pallas_kernels.packed_experts.layout import SCALES, SMALL_TILE, TILE, Record


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
    begin, end = dict(zip(("gate", "up", "down"), pairwise((*record.offsets, record.nbytes))))[part]
    wide, width = record.model_dim, record.hidden_dim
    rows, columns = (width, wide) if part == "down" else (wide, width)
    stored = stored[begin:end]
    if record.scaled:
        tiles = stored.reshape(columns // SMALL_TILE, -1)
        size = record.group * SMALL_TILE * record.bits // 8 + SCALES
        whole = rows // record.group
        groups = tiles[:, : whole * size].reshape(len(tiles), whole, size), tiles[:, None, whole * size :]
        return jnp.concatenate([_scaled(part, record.bits) for part in groups if part.size])
    dtype = jnp.float32 if record.bits == 32 else jnp.bfloat16
    elements = lax.bitcast_convert_type(stored.reshape(-1, record.bits // 8), dtype)
    return _untiled(elements, columns).astype(jnp.float32)


def _scaled(groups: jax.Array, bits: int) -> jax.Array:
    """Lines and scales, uint8 [tiles, groups, bytes] -> float32 [rows, columns]"""
    tiles, count, _ = groups.shape
    codes = lax.bitcast_convert_type(groups[..., :-SCALES], jnp.int8).reshape(tiles, count, -1, SMALL_TILE, 4)
    if bits == 4:
        codes = jnp.concatenate(((codes & 15) - 8, codes >> 4), axis=-1)
    scales = lax.bitcast_convert_type(
        groups[..., -SCALES:].reshape(tiles, count, 1, SMALL_TILE, 4), jnp.float32
    )
    codes = codes.transpose(1, 2, 4, 0, 3).reshape(count, -1, tiles * SMALL_TILE)
    scales = scales.transpose(1, 2, 0, 3).reshape(count, 1, -1)
    return (codes * scales).reshape(-1, tiles * SMALL_TILE)


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
