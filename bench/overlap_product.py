"""A product of prefill tokens beside decode attention, for `bench.overlap`: each alone, and both in one launch by `hybrid_matmul`.

A step that runs so is split in two: the output projection and gate_up of its decoding rows read their weights once more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.hopper import BANDWIDTH, CACHE, LAYER_PARAMETERS, OF_PEAK_PRODUCTS, ONE_READER, PEAK, PROCESSORS
from bench.low_bit_cases import operands
from bench.machine import seconds
from pallas_kernels.hybrid_matmul import _product as plain
from pallas_kernels.hybrid_matmul import hybrid_matmul, xla
from pallas_kernels.hybrid_matmul.shapes import Beside
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.int4_matmul import mosaic_gpu as packed
from pallas_kernels.int4_matmul.shapes import LowBitShape
from pallas_kernels.packed_pages import PackedPages, pack
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_attention.mosaic_gpu import PAGES, PART_STEPS, ROWS
from pallas_kernels.page_attention.shapes import ListShape

COMPILED = ("hybrid_matmul llama3_8b_gate_up", "hybrid_matmul llama3_8b_gate_up w4a8 int4")
# Assumed, to be measured. Of the tensor cores' peak: one packed product's block to a processor; mma.sync. Seconds: of a
# processor's tensor cores from a plain tile to the next, while it is written; of a step of attention, some 1,700 cycles of which
# most are waits for one another.
ONE_BLOCK, OF_PEAK_MMA = 0.55, 0.6
BETWEEN_TILES, STEP = 1.2e-6, 0.95e-6
HIDDEN, GATE_UP = 4096, 2 * 14336  # of Llama-3-8B
TWICE = (HIDDEN + GATE_UP) / GATE_UP  # what is read once more, over gate_up: the output projection as well


@dataclass(frozen=True)
class Pair:
    """Matrix and pages are in bfloat16, or W4A8 and INT4 if `low_bits`."""

    shape: Beside
    low_bits: bool


@dataclass(frozen=True)
class Work:
    """Counted for the kernels as they are.

    Attributes:
      flops: of the product, rows that fill tiles up included.
      tiles: as many as it has blocks or tiles of the result.
      cached: bytes that they ask of the second-level cache.
      weights: bytes of the matrix.
      rest: bytes of the product's rows and results.
      bytes: of pages, and of partial results.
      steps: of attention, PAGES pages each.
    """

    flops: int
    tiles: int
    cached: int
    weights: int
    rest: int
    bytes: int
    steps: int

    @classmethod
    def of(cls, pair: Pair) -> Work:
        size, pages = pair.shape.product, pair.shape.attention
        if pair.low_bits:
            low = size.inputs - size.outliers
            each = low // 2 + size.outliers + low // size.group + 8  # bytes of an output
            tall, wide = packed.ROWS[-1], packed.OUTPUTS
            weights, block = size.outputs * each, wide * each + tall * size.inputs
        else:
            tall, wide = plain.ROWS, plain.tile_columns(size.outputs)
            weights, copied = 2 * size.inputs * size.outputs, wide // plain.cluster_blocks(size.rows)
            block = 2 * size.inputs * (copied + tall)
        rows, columns = -(-size.rows // tall), size.outputs // wide
        flops = 2 * rows * tall * size.inputs * size.outputs
        rest = (
            rows * tall * (size.inputs if pair.low_bits else 2 * size.inputs) + 2 * size.rows * size.outputs
        )
        head = pages.head_dim // 2 + 4 if pair.low_bits else 2 * pages.head_dim
        heads, group = max(pages.lists, pages.kv_heads), pages.q_heads // pages.kv_heads
        part = PART_STEPS * PAGES * pages.page_size
        parts = sum(-(-tokens // part) for tokens in pages.tokens)
        steps = sum(-(-tokens // (PAGES * pages.page_size)) for tokens in pages.tokens)
        partial = 2 * parts * (4 * group * pages.head_dim + 2 * 4 * 16)
        read = heads * (2 * sum(pages.tokens) * head + partial)
        return cls(flops, rows * columns, rows * columns * block, weights, rest, read, heads * steps)

    @property
    def all_bytes(self) -> int:
        return self.weights + self.rest + self.bytes


def predicted(pair: Pair) -> tuple[float, float, float]:
    """Seconds of the best product alone, of decode attention alone and of both in one launch.

    Together both share the memory and the second-level cache.
    """
    work = Work.of(pair)
    peak = 2 * PEAK if pair.low_bits else PEAK
    compute, memory = work.flops / (OF_PEAK_PRODUCTS * peak), work.bytes / BANDWIDTH
    if pair.low_bits:  # there is no better one than that of the launch
        compute = max(compute, work.cached / CACHE)
    roles = _blocks_in_turn(work) if pair.low_bits else _queues(work, pair.shape.attention)
    joint = max((work.cached + work.bytes) / CACHE, work.all_bytes / BANDWIDTH, *roles)
    return compute, memory, joint


def _blocks_in_turn(work: Work) -> tuple[float, float]:
    """Seconds of the product and of attention with one block of each on a processor; they are handed out so that they end together."""
    return work.flops / (ONE_BLOCK * 2 * PEAK), work.all_bytes / BANDWIDTH / ONE_READER


def _queues(work: Work, pages: ListShape) -> tuple[float, float]:
    """Seconds of the fullest processor's queues: of the product, whose tensor cores attention borrows, and of attention."""
    one = PEAK / PROCESSORS
    tiles, steps = (math.ceil(count / PROCESSORS) for count in (work.tiles, work.steps))
    attends = steps * 4 * ROWS * PAGES * pages.page_size * pages.head_dim / (OF_PEAK_MMA * one)
    each = work.flops / work.tiles / (OF_PEAK_PRODUCTS * one) + BETWEEN_TILES if tiles else 0.0
    return tiles * each + attends, steps * STEP


def mixes(quick: bool) -> dict[str, Pair]:
    """gate_up of Llama-3-8B by prefill tokens and type; rows and tokens of the decoding, dense or chosen pages."""
    decodes = [(64, 2048, 1), (64, 8192, 1), (128, 1024, 8)]
    found = {
        f"{tokens} {'w4a8' if low_bits else 'bf16'} + {rows} x {listed}"
        f"{' int4' if low_bits else ''}{' chosen' if lists > 1 else ''}": Pair(
            Beside(LowBitShape(tokens, HIDDEN, GATE_UP), ListShape(32, 8, 128, 16, (listed,) * rows, lists)),
            low_bits,
        )
        for low_bits in (False, True)
        for tokens in (512, 1024, 2048)
        for rows, listed, lists in decodes
    }
    return dict(list(found.items())[3:5]) if quick else found


def counted(pair: Pair) -> dict[str, float]:
    work = Work.of(pair)
    return {
        "gflop": work.flops / 1e9,
        "mb": work.bytes / 1e6,
        "all_mb": work.all_bytes / 1e6,
        "cached_mb": work.cached / 1e6,
        "again_mb": TWICE * work.weights / 1e6,
    }


def around(pair: Pair, compute: float, product_again: float | None = None) -> dict[str, float]:
    """Seconds of the layer's other products, if those take as long as this one; and what the second reading of weights adds.

    Args:
      product_again: measured seconds of gate_up of the decoding rows alone.
    """
    size, rows = pair.shape.product, len(pair.shape.attention.tokens)
    each = compute / size.rows  # of a token in gate_up
    layer = each * (size.rows + rows) * LAYER_PARAMETERS / (size.inputs * size.outputs)
    alone = Work.of(pair).weights / BANDWIDTH if product_again is None else product_again
    return {"rest": layer - compute, "again": TWICE * max(alone - rows * each, 0.0)}


def programs(pair: Pair, paces: list[float], implementation: str | None) -> dict[str, Callable]:
    """From (x, w, *attention): each alone, both in sequence, and in one launch at each pace."""
    scale = pair.shape.attention.head_dim**-0.5

    def product(x, w, *_):
        return int4_matmul(x, w) if pair.low_bits else jnp.matmul(x, w)

    def attend(x, w, *attention):
        return page_attention(*attention, scale=scale)

    def own(x, w, q, *attention):
        """By the launch, without attention."""
        *pool, lists, tokens = attention
        none = (q[:0], *pool, lists[:0], tokens[:0])
        return hybrid_matmul(x, w, *none, scale=scale, implementation=implementation)[0]

    def in_sequence(*args):
        return xla.hybrid_matmul(*args, scale=scale)

    def beside(pace, *args):
        return hybrid_matmul(*args, scale=scale, pace=pace, implementation=implementation)

    joint = {f"joint {pace:g}": functools.partial(beside, pace) for pace in paces}
    return {"compute": product, "memory": attend, "own": own, "sequence": in_sequence} | joint


def measured(pair: Pair, paces: list[float]) -> dict[str, float]:
    """Seconds of each program; of both parts as independent chains of one graph; and of what splitting costs."""
    args = arrays(pair, jnp.bfloat16)

    def time_of(call: Callable, given: tuple = args, **options) -> float:
        compiled = jax.jit(call).lower(*given).compile(options or None)
        return seconds(lambda: compiled(*given), 20)

    calls = programs(pair, paces if pair.low_bits else paces[:1], "mosaic_gpu")  # a plain one has no pace
    row = {name: time_of(call) for name, call in calls.items()}
    row["joint"] = min(row[name] for name in calls if name.startswith("joint"))
    row["concurrent"] = time_of(calls["sequence"], xla_gpu_command_buffer_scheduling_mode="CONCURRENT")
    few = jax.tree.map(lambda a: a[: len(pair.shape.attention.tokens)], args[0])
    again = time_of(calls["compute"], (few, args[1]))
    return row | around(pair, row["compute"], again)


def arrays(pair: Pair, dtype: Any) -> tuple:
    """Arguments of hybrid_matmul; every row of attention has pages of its own."""
    size, attends = pair.shape
    keys = jax.random.split(jax.random.key(0), 5)
    product: tuple = operands(size, "w4a8", dtype)
    if not pair.low_bits:
        sizes = (size.rows, size.inputs), (size.inputs, size.outputs)
        product = tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, sizes))
    rows, width = len(attends.tokens), -(-max(attends.tokens) // attends.page_size)
    order = np.random.default_rng(0).permutation(rows * width).astype(np.int32)
    lists = np.repeat(order.reshape(rows, 1, width), attends.lists, axis=1)
    tokens = np.repeat(np.array(attends.tokens, np.int32)[:, None], attends.lists, axis=1)
    shape = (1, rows * width, attends.kv_heads, attends.page_size, attends.head_dim)
    pools: list = [jax.random.normal(key, shape, dtype) for key in keys[2:4]]
    if pair.low_bits:
        pools = [PackedPages(*pack(pool, 4)) for pool in pools]
    q = jax.random.normal(keys[4], (rows, attends.q_heads, attends.head_dim), dtype)
    return *product, q, *pools, jnp.int32(0), jnp.asarray(lists), jnp.asarray(tokens)
