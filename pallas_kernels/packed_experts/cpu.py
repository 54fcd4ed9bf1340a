"""packed_experts as a native CPU kernel: one custom call a layer, each touched record read from memory once."""

import os

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register
from pallas_kernels.expert_mlp.cpu import ACTIVATION_CODES, MAX_WORKERS, ROW_PAD
from pallas_kernels.packed_experts.layout import Record

# One worker's packed block of weights: DEPTH_BLOCK (_native.py) rows of the widest tile.
PACK_FLOATS = 128 * 64


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
    if activation not in ACTIVATION_CODES:
        raise NotImplementedError(f"activation {activation!r}; one of {sorted(ACTIVATION_CODES)}")
    module, dtype = "pallas_kernels.packed_experts._native", record.format
    name = register(
        f"pallas_kernels.packed_experts.{dtype}", module, f"{dtype}_handler", tiles=("float32", dtype)
    )
    tokens, top_k = expert_ids.shape
    experts = records.shape[0]
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    results = tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in work_arrays(tokens, top_k, experts, record, workers)
    )
    out, *_ = jax.ffi.ffi_call(name, results, vmap_method="sequential")(
        x.astype(jnp.float32),
        records,
        jnp.zeros((experts, record.hidden_dim, 0), jnp.int8),
        expert_ids.astype(jnp.int32),
        expert_weights.astype(jnp.float32),
        jnp.int32(ACTIVATION_CODES[activation]),
        jnp.asarray([*record.offsets, record.nbytes, record.group], jnp.int32),
    )
    return out.astype(x.dtype)


def work_arrays(tokens: int, top_k: int, experts: int, record: Record, workers: int):
    """Shapes and types of the results of one call, see `_native`."""
    pairs, wide, width = tokens * top_k, record.model_dim, record.hidden_dim
    return (
        ((tokens, wide), jnp.float32),
        ((2 * pairs + 2 * experts + 2,), jnp.int32),
        ((pairs, wide + ROW_PAD), jnp.float32),
        ((pairs, 2 * width + ROW_PAD), jnp.float32),
        ((pairs, wide + ROW_PAD), jnp.float32),
        ((workers, PACK_FLOATS), jnp.float32),
    )
