"""expert_mlp as a native CPU kernel: one custom call a layer, each touched expert's weights read from memory once."""

import os

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register

ACTIVATION_CODES = {"silu": 0, "gelu_tanh": 1}
DTYPES = ("float32", "bfloat16")
# Rows of the work arrays are this much longer than the data, so that a power of two does not map the same column of
# all rows to one cache set.
ROW_PAD = 16
# One worker's packed block of weights: DEPTH_BLOCK (_native.py) rows of the widest tile.
PACK_FLOATS = 128 * 64
MAX_WORKERS = 64


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
    tokens, top_k = expert_ids.shape
    experts, hidden_dim, model_dim = down.shape
    dtype = jnp.dtype(gate_up.dtype).name
    if dtype not in DTYPES or down.dtype != gate_up.dtype:
        raise NotImplementedError(f"weights of {dtype} and {down.dtype}; both must be one of {DTYPES}")
    if activation not in ACTIVATION_CODES:
        raise NotImplementedError(f"activation {activation!r}; one of {sorted(ACTIVATION_CODES)}")
    if model_dim % 16 or hidden_dim % 16:
        raise NotImplementedError(f"model width {model_dim}, hidden width {hidden_dim}; multiples of 16 go")
    module = "pallas_kernels.expert_mlp._native"
    name = register(
        f"pallas_kernels.expert_mlp.{dtype}", module, f"{dtype}_handler", tiles=("float32", dtype)
    )

    pairs = tokens * top_k
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    results = (
        jax.ShapeDtypeStruct((tokens, model_dim), jnp.float32),
        jax.ShapeDtypeStruct((2 * pairs + 2 * experts + 2,), jnp.int32),
        jax.ShapeDtypeStruct((pairs, model_dim + ROW_PAD), jnp.float32),
        jax.ShapeDtypeStruct((pairs, 2 * hidden_dim + ROW_PAD), jnp.float32),
        jax.ShapeDtypeStruct((pairs, model_dim + ROW_PAD), jnp.float32),
        jax.ShapeDtypeStruct((workers, PACK_FLOATS), jnp.float32),
    )
    out, *_ = jax.ffi.ffi_call(name, results, vmap_method="sequential")(
        x.astype(jnp.float32),
        gate_up,
        down,
        expert_ids.astype(jnp.int32),
        expert_weights.astype(jnp.float32),
        jnp.int32(ACTIVATION_CODES[activation]),
    )
    return out.astype(x.dtype)
