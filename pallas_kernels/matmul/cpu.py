"""matmul as a native CPU kernel: weights stream from memory while the tiles before them are multiplied."""

import os

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register
from pallas_kernels.matmul import xla

DTYPES = ("float32", "bfloat16")
# Where the kernel is faster, measured on Zen 5. XLA's dot of one float32 row is at the speed of memory, that of many
# bfloat16 rows uses instructions for them; one bfloat16 row is widened first, which takes eight times as long.
FEWEST_ROWS = {"float32": 2, "bfloat16": 1}
MOST_ROWS = {"float32": 64, "bfloat16": 12}
# Below this a call costs more than it saves.
FEWEST_WEIGHTS = 1 << 18
# Rows of x are this much longer than the data, so that a power of two does not map the same column of all rows to one
# cache set.
ROW_PAD = 16
CACHE_WAYS = 8
# One worker's packed block of weights: DEPTH_BLOCK (_native.py) rows of the widest tile.
PACK_FLOATS = 128 * 64
MAX_WORKERS = 64


def pays(rows: int, depth: int, columns: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel is faster than XLA's dot."""
    most = MOST_ROWS.get(jnp.dtype(dtype).name)
    if most is None or depth * columns < FEWEST_WEIGHTS:
        return False
    return FEWEST_ROWS[jnp.dtype(dtype).name] <= rows <= most


@jax.custom_jvp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """See `api.matmul`."""
    dtype = jnp.dtype(w.dtype).name
    if dtype not in DTYPES:
        raise NotImplementedError(f"weights of {dtype}; one of {DTYPES}")
    if w.shape[1] % 8 or 0 in (*x.shape, *w.shape):
        raise NotImplementedError(f"x {x.shape}, weights {w.shape}; multiples of 8 columns, and no axis of 0")
    module = "pallas_kernels.matmul._native"
    name = register(f"pallas_kernels.matmul.{dtype}", module, f"{dtype}_handler", tiles=("float32", dtype))
    if x.shape[0] > CACHE_WAYS:
        x = jnp.pad(x, ((0, 0), (0, ROW_PAD)))
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    results = (
        jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32),
        jax.ShapeDtypeStruct((workers, PACK_FLOATS), jnp.float32),
    )
    return jax.ffi.ffi_call(name, results, vmap_method="sequential")(x.astype(jnp.float32), w)[0]


@matmul.defjvp
def _derivative(primals, tangents):
    return matmul(*primals), jax.jvp(xla.matmul, primals, tangents)[1]
