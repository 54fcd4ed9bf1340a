"""`python -m bench overlap`: attention of a mixed step: prefill alone, decode alone, and both in one launch.

On a GPU everything is measured. Elsewhere the joint time is a prediction from counted operations and bytes, and from the
shares of an H200 that are written below; what the kernel takes of a processor comes from the compiler, where it is installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bench.machine import seconds
from bench.result import Result
from jaxinfer.schedule.profile import Joint
from pallas_kernels._h200.apart import compile_apart
from pallas_kernels._h200.report import Failure
from pallas_kernels.hybrid_attention import hybrid_attention, xla
from pallas_kernels.hybrid_attention.shapes import MixedShape
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_attention.mosaic_gpu import PAGES, PART_STEPS
from pallas_kernels.ragged_attention import ragged_attention
from pallas_kernels.ragged_attention.mosaic_gpu import KEYS, ROWS, tile_tokens

GOOD = 0.3  # of the shorter time, on top of the longer one
USEFUL = 0.25  # the shorter time over the longer one, from which on overlap is worth having
COMPILED = "hybrid_attention llama3_8b_balanced"

# An H200, in cycles of one processor: bfloat16 operations, exponentials, and bytes a second of all of them.
PROCESSORS, CLOCK = 132, 1.83e9
OPERATIONS, EXPONENTIALS = 4096, 16
BANDWIDTH = 0.85 * 4.8e12
# Assumed, to be measured: share of the tensor cores' peak with two prefill blocks to a processor; cycles of a softmax over those
# of its exponentials; share of the bandwidth with one decode block to a processor.
OF_PEAK, SOFTMAX, ONE_READER = 0.6, 1.25, 0.9
OF_PEAK_PRODUCTS = 0.7  # of matrix products, as in `schedule.profile.H200`
LAYER_PARAMETERS = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336  # of Llama-3-8B


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
    compute = work.flops / (OF_PEAK * OPERATIONS * PROCESSORS * CLOCK)
    memory = work.bytes / BANDWIDTH
    product = 4 * ROWS * KEYS * shape.head_dim / OPERATIONS
    softmax = SOFTMAX * ROWS * KEYS / EXPONENTIALS
    prefill_rate = max(2 * product, product + softmax) / (2 * (product + softmax))
    both = min(compute / prefill_rate, memory / ONE_READER)
    rest = max(compute - both * prefill_rate, 0.0) + max(memory - both * ONE_READER, 0.0)
    return compute, memory, both + rest


def joint_of(rows: list[dict[str, Any]]) -> Joint:
    """Fitted to the rows: of attention alone, so not that of a `Cost`, most of whose compute is matrix products."""
    return Joint.fit([(row["compute"], row["memory"], row["joint"]) for row in rows])


def _products(shape: MixedShape) -> float:
    """Operations of a layer's matrix products, which this launch does not overlap with anything."""
    tokens = sum(tokens for tokens, _ in shape.chunks) + len(shape.decodes)
    return 2.0 * tokens * LAYER_PARAMETERS


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


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench overlap")
    parser.add_argument(
        "--pace", type=float, action="append", help="of hybrid_attention, again for more; the best counts"
    )
    known = parser.parse_args(options)
    paces = known.pace or ([1.0] if quick else [1.0, 1.5, 3.0])
    on_gpu = jax.default_backend() == "gpu"
    result = Result("overlap", {"measured": on_gpu, "quick": quick, "paces": paces})
    for name, shape in mixes(quick).items():
        work = Work.of(shape)
        row: dict[str, Any] = {"mix": name, "gflop": work.flops / 1e9, "mb": work.bytes / 1e6}
        if on_gpu:
            row |= _measured(shape, paces)
        else:
            row |= zip(("compute", "memory", "joint"), predicted(shape))
        products = _products(shape) / (OF_PEAK_PRODUCTS * OPERATIONS * PROCESSORS * CLOCK)
        apart = row["compute"] + row["memory"]
        row["step_gain"] = (products + apart) / (products + row["joint"])
        long, short = max(row["compute"], row["memory"]), min(row["compute"], row["memory"])
        row |= {"over_bound": row["joint"] / (long + GOOD * short), "useful": short >= USEFUL * long}
        result.rows.append(row)
        print(row, flush=True)
    useful = [row for row in result.rows if row["useful"]] or result.rows
    joint = joint_of(useful)
    result.summary = {
        "measured": int(on_gpu),
        "joint_over_bound": max(row["over_bound"] for row in useful),
        "step_gain_most": max(row["step_gain"] for row in result.rows),
        "step_gain_mean": float(np.mean([row["step_gain"] for row in result.rows])),
        "joint_linear": joint.linear,
        "joint_square": joint.square,
        **_occupancy(),
    }
    if not on_gpu:
        print("No GPU: joint times are predictions from counted work and assumed shares of an H200.")
    return result


def _occupancy() -> dict[str, float]:
    """What the kernel takes of a processor; nothing where the compiler for it is not installed (`make h200` installs it)."""
    plugins = ("jax_plugins", "jax_plugins.xla_cuda13")
    if any(importlib.util.find_spec(name) is None for name in plugins):
        return {}
    try:
        (kernel,), _ = compile_apart(COMPILED)
    except Failure as failure:
        print(f"does not compile for the H200: {failure}")
        return {}
    return {
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "shared_bytes": kernel.shared_bytes,
        "blocks_per_processor": kernel.blocks_per_processor,
    }


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


def _measured(shape: MixedShape, paces: list[float]) -> dict[str, float]:
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
