"""int4_matmul as a native CPU kernel: packed weights are read once, opened in registers, and multiplied as 8-bit
integers; where activations are floats, as floats."""

import math
import os

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register
from pallas_kernels.int4_matmul.matrix import PackedMatrix
from pallas_kernels.quantize.rows import QuantizedRows

MAX_WORKERS = 64
WORDS = 32  # int64 of a tile's arguments, and room to keep workers' cache lines apart
# A float32 lane sums products of code, group scale and activation exactly up to so many channels.
CHANNELS_PER_LANE = 2**24 // (128 * 120)


def int4_matmul(x: QuantizedRows, w: PackedMatrix, group_sizes: jax.Array | None = None) -> jax.Array:
    """See `api.int4_matmul`."""
    _check(x, w)
    rows, grouped = x.tokens, group_sizes is not None
    if group_sizes is None:
        group_sizes = jnp.full(1, rows, jnp.int32)
        w = jax.tree.map(lambda a: a[None], w)
    experts = group_sizes.shape[0]
    name = register("pallas_kernels.int4_matmul", "pallas_kernels.int4_matmul._native")

    def given(array, *empty, dtype):
        return jnp.zeros(empty, dtype) if array is None else array

    args = (
        given(x.low if x.low_scale is not None else _wide(x.low), rows, 0, dtype=jnp.int8),
        given(x.low_scale, rows, 0, dtype=jnp.float32),
        given(x.high, rows, 0, dtype=jnp.int8),
        given(x.high_scale, rows, 0, dtype=jnp.float32),
        given(w.low, experts, 0, 0, dtype=jnp.uint8),
        given(w.scale, experts, 0, 0, dtype=jnp.float32),
        given(w.channel, experts, 0, dtype=jnp.float32),
        given(w.high, experts, 0, 0, dtype=jnp.int8),
        given(w.high_scale, experts, 0, dtype=jnp.float32),
        group_sizes.astype(jnp.int32),
    )
    lanes = _start_lanes(w)
    results = (
        jax.ShapeDtypeStruct((rows, w.outputs), jnp.float32),
        jax.ShapeDtypeStruct((rows, lanes), jnp.int32),
        jax.ShapeDtypeStruct((2 * experts + 2,), jnp.int32),
        jax.ShapeDtypeStruct((min(os.cpu_count() or 1, MAX_WORKERS), 2 * WORDS), jnp.int32),
    )
    out = jax.ffi.ffi_call(name, results, vmap_method="sequential")(*args)[0]
    if grouped:
        out = jnp.where((jnp.arange(rows) < group_sizes.sum())[:, None], out, 0)
    return out


def _wide(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x.astype(jnp.float32)


def _check(x: QuantizedRows, w: PackedMatrix) -> None:
    floats = x.low is not None and x.low_scale is None
    if x.low is not None and floats and x.low.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"low activations of {x.low.dtype}; int8, float32 or bfloat16")
    if x.high is not None and (x.high.dtype != jnp.int8 or floats):
        raise NotImplementedError(f"high activations of {x.high.dtype}; int8, beside int8")
    if x.tokens == 0:
        raise NotImplementedError("no rows")
    if w.high is not None and (w.high.dtype != jnp.int8 or w.high.shape[-1] % 16):
        raise NotImplementedError(
            f"{w.high.shape[-1]} outlier channels of {w.high.dtype}; int8, a multiple of 16"
        )
    if w.low is not None and w.group % 16:
        raise NotImplementedError(f"groups of {w.group}; a multiple of 16")
    if w.low is not None and w.channel is not None:
        most = CHANNELS_PER_LANE * _lanes(w.group)
        if 2 * w.low.shape[-1] > most:
            raise NotImplementedError(
                f"{2 * w.low.shape[-1]} channels; at most {most} with two levels of scales"
            )


def _start_lanes(w: PackedMatrix) -> int:
    lanes = 0
    if w.low is not None:
        lanes += w.groups * _lanes(w.group)
    if w.high is not None:
        lanes += math.gcd(w.high.shape[-1], 64) // 4
    return lanes


def _lanes(group: int) -> int:
    """int32 lanes of the vectors that groups of so many channels are summed in."""
    return max(math.gcd(group, 128) // 2, 16) // 4
