"""Attention of a mixed step, for `bench.overlap`: prefill alone, decode alone, and both in one launch by `hybrid_attention`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bench.hopper import BANDWIDTH, EXPONENTIALS, ONE_READER, OPERATIONS, PEAK, layer_products
from bench.machine import seconds
from pallas_kernels.hybrid_attention import hybrid_attention, xla
from pallas_kernels.hybrid_attention.shapes import MixedShape
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_attention.mosaic_gpu import PAGES, PART_STEPS
from pallas_kernels.ragged_attention import ragged_attention
from pallas_kernels.ragged_attention.mosaic_gpu import KEYS, ROWS, tile_tokens

COMPILED = ("hybrid_attention llama3_8b_balanced",)
# Assumed, to be measured: share of the tensor cores' peak with two prefill blocks to a processor; cycles of a softmax over those
# of its exponentials.
OF_PEAK, SOFTMAX = 0.6, 1.25


@dataclass(frozen=True)
class Work:
    """Counted for the kernels as they are: what tiles compute beyond the causal triangle, and partial results, included."""

    flops: int
    bytes: int

    @classmethod
    def of(cls, shape: MixedShape) -> Work:
        group, size = shape.q_heads // shape.kv_heads, tile_tokens(shape.q_heads // shape.kv_heads)
        blocks = 0
        for tokens, length in shape.chunks:
            ends = np.minimum(length - tokens + size * np.arange(1, -(-tokens // size) + 1), length)
            blocks += int((-(-ends // KEYS)).sum())
        flops = 4 * shape.head_dim * ROWS * KEYS * blocks * shape.kv_heads
        heads = max(shape.lists, shape.kv_heads)
        part = PART_STEPS * PAGES * shape.page_size
        parts = sum(-(-tokens // part) for tokens in shape.decodes)
        read = 4 * sum(shape.decodes) * shape.head_dim
        return cls(flops, heads * (read + 2 * parts * (4 * group * shape.head_dim + 2 * 4 * 16)))


def predicted(shape: MixedShape) -> tuple[float, float, float]:
    """Seconds of prefill alone, of decode alone and of both in one launch.

    Alone a role has both places of each processor. Together each has one until one of them is through: a prefill block
    then has nobody to compute while it is at its softmax, and a decode block reads with ONE_READER of the bandwidth.
    """
    work = Work.of(shape)
    compute = work.flops / (OF_PEAK * PEAK)
    memory = work.bytes / BANDWIDTH
    product = 4 * ROWS * KEYS * shape.head_dim / OPERATIONS
    softmax = SOFTMAX * ROWS * KEYS / EXPONENTIALS
    prefill_rate = max(2 * product, product + softmax) / (2 * (product + softmax))
    both = min(compute / prefill_rate, memory / ONE_READER)
    rest = max(compute - both * prefill_rate, 0.0) + max(memory - both * ONE_READER, 0.0)
    return compute, memory, both + rest


def mixes(quick: bool) -> dict[str, MixedShape]:
    """Of Llama-3-8B: by tokens and context of the chunk, rows and tokens of the decoding, dense or chosen pages."""
    chunks = [(512, 4096), (2048, 2048), (1024, 16384)]
    decodes = [(16, 2048, 1), (64, 2048, 1), (64, 8192, 1), (128, 1024, 8)]
    found = {
        f"{tokens}/{length} + {rows} x {listed}{' chosen' if lists > 1 else ''}": MixedShape(
            32, 8, 128, 16, ((tokens, length),), (listed,) * rows, lists
        )
        for tokens, length in chunks
        for rows, listed, lists in decodes
    }
    return dict(list(found.items())[4:6]) if quick else found


def counted(shape: MixedShape) -> dict[str, float]:
    work = Work.of(shape)
    return {"gflop": work.flops / 1e9, "mb": work.bytes / 1e6}


def around(shape: MixedShape, compute: float) -> dict[str, float]:
    """Seconds of the layer's matrix products, which this launch overlaps with nothing; it does nothing twice."""
    tokens = sum(tokens for tokens, _ in shape.chunks) + len(shape.decodes)
    return {"rest": layer_products(tokens), "again": 0.0}


def programs(shape: MixedShape, paces: list[float], implementation: str) -> dict[str, Callable]:
    """From the arguments of hybrid_attention: each role alone, both in sequence, and in one launch at each pace."""
    scale = shape.head_dim**-0.5

    def prefill(*args):
        q, k, v, layer, table, starts, counts, lengths, single = args[:9]
        rows = (table, starts, jnp.where(single, 0, counts), lengths)
        return ragged_attention(q, k, v, layer, *rows, scale=scale, implementation=implementation)

    def decode(*args):
        (q, k, v, layer, _, starts), (lists, tokens) = args[:6], args[-2:]
        return page_attention(
            q[starts], k, v, layer, lists, tokens, scale=scale, implementation=implementation
        )

    def in_sequence(*args):
        return xla.hybrid_attention(*args, scale=scale, window=0, implementation=implementation)

    def beside(pace, *args):
        return hybrid_attention(*args, scale=scale, pace=pace, implementation=implementation)

    joint = {f"joint {pace:g}": functools.partial(beside, pace) for pace in paces}
    return {"compute": prefill, "memory": decode, "sequence": in_sequence} | joint


def measured(shape: MixedShape, paces: list[float]) -> dict[str, float]:
    """Seconds of each program; of both roles as independent chains of one graph; and of the framework's prefill."""
    args = arrays(shape)

    def time_of(call: Callable, **options) -> float:
        compiled = jax.jit(call).lower(*args).compile(options or None)
        return seconds(lambda: compiled(*args), 20)

    calls = programs(shape, paces, "mosaic_gpu")
    row = {name: time_of(call) for name, call in calls.items()}
    row["joint"] = min(row[name] for name in calls if name.startswith("joint"))
    row["concurrent"] = time_of(calls["sequence"], xla_gpu_command_buffer_scheduling_mode="CONCURRENT")
    try:
        row["gathered"] = time_of(functools.partial(gathered, shape))
    except (ValueError, RuntimeError, NotImplementedError) as error:  # cuDNN does not take every shape
        print(f"the framework's fused attention: {error}")
    return row


def gathered(
    shape: MixedShape, *args: jax.Array, implementation: Literal["xla", "cudnn"] = "cudnn"
) -> jax.Array:
    """The first chunk's attention [1, tokens, Hq, D] by gathering its pages, then the framework's fused attention."""
    (tokens, length), row = shape.chunks[0], len(shape.decodes)
    q, k_pages, v_pages, layer, table = args[:5]
    pages = table[row, : -(-length // shape.page_size)]
    k, v = (
        pool[layer, pages].swapaxes(1, 2).reshape(1, -1, shape.kv_heads, shape.head_dim)[:, :length]
        for pool in (k_pages, v_pages)
    )
    mask = None
    if tokens < length:
        mask = jnp.arange(length) <= jnp.arange(length - tokens, length)[:, None]
        mask = mask[None, None]
    return jax.nn.dot_product_attention(
        q[None, row : row + tokens], k, v, mask=mask, is_causal=mask is None, implementation=implementation
    )


def arrays(shape: MixedShape) -> tuple:
    """Arguments of hybrid_attention: decoding rows first, then the chunks; every row has pages of its own."""
    page, rng = shape.page_size, np.random.default_rng(0)
    lengths = np.array([*shape.decodes, *(length for _, length in shape.chunks)], np.int32)
    counts = np.array([1] * len(shape.decodes) + [tokens for tokens, _ in shape.chunks], np.int32)
    starts = np.cumsum(counts, dtype=np.int32) - counts
    single = np.arange(len(lengths)) < len(shape.decodes)
    own = -(-lengths // page)
    order = rng.permutation(int(own.sum())).astype(np.int32)
    table = np.zeros((len(lengths), own.max()), np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(own), own)):
        table[row, :count] = order[end - count : end]
    width = -(-max(shape.decodes) // page)
    lists = np.repeat(table[:, None, :width], shape.lists, axis=1)
    tokens = np.repeat(np.where(single, lengths, 0)[:, None], shape.lists, axis=1).astype(np.int32)
    pool = (1, len(order), shape.kv_heads, page, shape.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, pool, jnp.bfloat16) for key in keys[:2])
    q = jax.random.normal(keys[2], (int(counts.sum()), shape.q_heads, shape.head_dim), jnp.bfloat16)
    rows = (table, starts, counts, lengths, single, lists, tokens)
    return (q, k, v, jnp.int32(0), *(jnp.asarray(a) for a in rows))
