"""ragged_attention as a native CPU kernel: decode rows stream their pages once, prefill tiles run on register tiles."""

import os

import jax
import jax.numpy as jnp

from pallas_kernels._cpu.register import register
from pallas_kernels.packed_pages import PackedPages

DTYPES = ("float32", "bfloat16")
PAGE_SIZES = (8, 16, 32)
# Query rows (tokens times group) of a prefill tile: enough to pay for packing the keys, few enough for the cache.
TILE_ROWS = 144
# Keys of one step of the online softmax, at fixed multiples of it whatever the chunking.
PREFILL_KEYS = 128
MAX_WORKERS = 64


def ragged_attention(
    q: jax.Array,
    k_pages: jax.Array | PackedPages,
    v_pages: jax.Array | PackedPages,
    layer: jax.Array | int,
    page_table: jax.Array,
    query_start: jax.Array,
    query_len: jax.Array,
    kv_len: jax.Array,
    *,
    scale: float,
    window: jax.Array | int,
) -> jax.Array:
    """See `api.ragged_attention`."""
    tokens, q_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    kind, pools, words = pool_arrays(k_pages, v_pages, head_dim)
    module = "pallas_kernels.ragged_attention._native"
    name = register(f"pallas_kernels.ragged_attention.{kind}", module, f"{kind}_handler", tiles=tiles(kind))

    group = q_heads // kv_heads
    tile = max(8, TILE_ROWS // group)
    items = query_len.shape[0] + tokens // tile + 1
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    results = (
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct((2 * items + tokens,), jnp.int32),
        jax.ShapeDtypeStruct((workers, _scratch_floats(tile * group, head_dim)), jnp.float32),
    )
    out, *_ = jax.ffi.ffi_call(name, results, vmap_method="sequential")(
        q.astype(jnp.float32) * scale,
        *pools,
        jnp.asarray(layer, jnp.int32),
        *(a.astype(jnp.int32) for a in (page_table, query_start, query_len, kv_len)),
        jnp.asarray(window, jnp.int32),
        jnp.int32(tile),
        *words,
    )
    return out.astype(q.dtype)


def pool_arrays(k_pages, v_pages, head_dim: int) -> tuple[str, list[jax.Array], list[jax.Array]]:
    """ "float32", "bfloat16" or "packed"; the arrays of both pools; the words of packed ones.

    Raises NotImplementedError for pools that the native kernels do not take.
    """
    page_size, packed = k_pages.shape[3], isinstance(k_pages, PackedPages)
    if page_size not in PAGE_SIZES:
        raise NotImplementedError(f"page size {page_size}; one of {PAGE_SIZES}")
    if packed != isinstance(v_pages, PackedPages):
        raise NotImplementedError("one pool is packed, the other is not")
    if packed:
        bits = k_pages.bits(head_dim), v_pages.bits(head_dim)
        if bits[0] != bits[1] or head_dim % (128 // bits[0]):
            raise NotImplementedError(
                f"{bits} bits of head dimension {head_dim}; equal ones, a multiple of {128 // bits[0]}"
            )
        return "packed", [k_pages.codes, v_pages.codes], [k_pages.words, v_pages.words]
    dtype = jnp.dtype(k_pages.dtype).name
    if dtype not in DTYPES or v_pages.dtype != k_pages.dtype or head_dim % 8:
        raise NotImplementedError(
            f"pools of {dtype} and {v_pages.dtype}, head dimension {head_dim}; both one of {DTYPES}, a multiple of 8"
        )
    return dtype, [k_pages, v_pages], []


def tiles(kind: str) -> tuple[str, ...]:
    """What the native code for pools of this kind calls."""
    return ("float32",) if kind == "packed" else ("float32", kind)


def _scratch_floats(rows: int, head_dim: int) -> int:
    """One worker's queries, outputs, scores, maxima and sums of a prefill tile, and a block of keys and values."""
    return rows * (2 * head_dim + PREFILL_KEYS + 2) + 2 * PREFILL_KEYS * head_dim + 64
