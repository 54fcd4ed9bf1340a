"""`python -m bench kernels`: the kernels for pages, experts and low bits of this platform against their XLA twins: equal, and how much faster."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import low_bit_cases
from bench.kernel_case import Case
from bench.machine import memory_bandwidth, seconds
from bench.result import Result
from pallas_kernels.expert_mlp import expert_mlp
from pallas_kernels.expert_mlp.shapes import ON_GPU as EXPERT_SHAPES_ON_GPU
from pallas_kernels.expert_mlp.shapes import SHAPES as EXPERT_SHAPES
from pallas_kernels.packed_pages import PackedPages, pack
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_attention.shapes import SHAPES as ATTENTION_SHAPES
from pallas_kernels.page_bounds import page_bounds
from pallas_kernels.page_bounds.shapes import SHAPES as BOUNDS_SHAPES
from pallas_kernels.page_scores import page_scores
from pallas_kernels.page_scores.shapes import SHAPES as SCORES_SHAPES
from pallas_kernels.page_select import page_select
from pallas_kernels.page_select.shapes import SHAPES as SELECT_SHAPES

NATIVE = {"cpu": "cpu", "gpu": "mosaic_gpu"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of outputs, absolute and relative


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench kernels")
    parser.add_argument("--only", default="", help="part of an op's or shape's name")
    known = parser.parse_args(options)
    backend = jax.default_backend()
    dtype = jnp.dtype("float32" if backend == "cpu" else "bfloat16")
    bandwidth = memory_bandwidth()
    result = Result(
        "kernels", {"native": NATIVE[backend], "dtype": dtype.name, "bandwidth": bandwidth, "quick": quick}
    )
    for name, make in _cases(dtype).items():
        if known.only in name:
            result.rows.append(_measured(make(), NATIVE[backend], dtype.name, bandwidth, 2 if quick else 7))
            print(result.rows[-1], flush=True)
    wrong = [row for row in result.rows if row["equal"] is False]
    result.summary = {
        "cases": len(result.rows),
        "wrong": len(wrong),
        "not_taken": sum(row["equal"] is None for row in result.rows),
    }
    return result


def _measured(case: Case, native: str, dtype: str, bandwidth: float, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "equal": None}
    calls = {name: jax.jit(partial(_call, case, name)) for name in (native, "xla")}
    try:
        found, wanted = (case.meaningful(call(*case.arguments)) for call in calls.values())
    except NotImplementedError as reason:
        return row | {"reason": str(reason)}
    errors = [float(np.max(np.abs(a - b) / (1 + np.abs(b)), initial=0)) for a, b in zip(found, wanted)]
    row |= {"error": max(errors, default=0.0)}
    row["equal"] = len(found) == len(wanted) and row["error"] <= TOLERANCE[dtype]
    times = {name: seconds(partial(call, *case.arguments), repeats) for name, call in calls.items()}
    row |= {"us": times[native] * 1e6, "over_twin": times["xla"] / times[native]}
    return row | {"of_byte_floor": times[native] / (case.floor / bandwidth)}


def _call(case: Case, implementation: str, *arguments: Any) -> Any:
    return case.call(implementation, arguments)


def _cases(dtype) -> dict[str, Callable[[], Case]]:
    """By name; the arrays of one case at a time."""
    made: dict[str, Callable[[], Case]] = {}
    for name, attended in ATTENTION_SHAPES.items():
        for kind in (dtype.name, "int8", "int4"):
            made[f"page_attention {name} {kind}"] = partial(_attention, name, attended, kind, dtype)
    for name, scored in SCORES_SHAPES.items():
        made[f"page_scores {name}"] = partial(_scores, name, scored, dtype)
    for name, selected in SELECT_SHAPES.items():
        made[f"page_select {name}"] = partial(_select, name, selected)
    for name, bounded in BOUNDS_SHAPES.items():
        made[f"page_bounds {name}"] = partial(_bounds, name, bounded, dtype)
    for name, chosen in (EXPERT_SHAPES if dtype == jnp.float32 else EXPERT_SHAPES_ON_GPU).items():
        made[f"expert_mlp {name}"] = partial(_experts, name, chosen, dtype)
    return made | low_bit_cases.by_name(dtype)


def _attention(name: str, shape, kind: str, dtype) -> Case:
    rng = np.random.default_rng(0)
    count = -(-np.array(shape.tokens) // shape.page_size)
    pages = int(count.sum()) * shape.lists + 1
    lists = np.zeros((len(count), shape.lists, max(count)), np.int32)
    order = iter(rng.permutation(np.arange(1, pages)))
    for row, n in enumerate(count):
        lists[row, :, :n] = [[next(order) for _ in range(n)] for _ in range(shape.lists)]
    tokens = np.broadcast_to(np.array(shape.tokens)[:, None], lists.shape[:2])
    pool = (1, pages, shape.kv_heads, shape.page_size, shape.head_dim)
    pools: list[Any] = [jax.random.normal(key, pool, dtype) for key in jax.random.split(jax.random.key(1))]
    size: float = dtype.itemsize
    if kind.startswith("int"):
        pools = [PackedPages(*pack(a, int(kind[3:]))) for a in pools]
        size = int(kind[3:]) / 8 + 4 / shape.head_dim
    q = jax.random.normal(jax.random.key(2), (len(count), shape.q_heads, shape.head_dim), dtype)
    heads = max(shape.lists, shape.kv_heads)
    floor = 2 * sum(shape.tokens) * heads * shape.head_dim * size

    def call(implementation, args):
        q, k, v, lists, tokens = args
        scale = shape.head_dim**-0.5
        return page_attention(q, k, v, 0, lists, tokens, scale=scale, implementation=implementation)

    arguments = (q, *pools, jnp.asarray(lists), jnp.asarray(tokens, jnp.int32))
    return Case("page_attention", f"{name} {kind}", call, arguments, floor)


def _scores(name: str, shape, dtype) -> Case:
    rng = np.random.default_rng(0)
    own = -(-np.array(shape.kv_len) // shape.page_size)
    pages = int(own.sum()) + 1
    order = iter(rng.permutation(np.arange(1, pages)))
    table = np.zeros((len(own), max(own)), np.int32)
    for row, n in enumerate(own):
        table[row, :n] = [next(order) for _ in range(n)]
    bounds = jnp.sort(
        jax.random.normal(jax.random.key(0), (1, pages, shape.kv_heads, 2, shape.head_dim), dtype), axis=3
    )
    q = jax.random.normal(jax.random.key(1), (len(own), shape.q_heads, shape.head_dim), dtype)

    def call(implementation, args):
        return page_scores(
            args[0], args[1], 0, *args[2:], page_size=shape.page_size, implementation=implementation
        )

    arguments = (q, bounds, jnp.asarray(table), jnp.asarray(shape.kv_len, jnp.int32))
    floor = 2 * int(own.sum()) * shape.kv_heads * shape.head_dim * dtype.itemsize
    return Case(
        "page_scores", name, call, arguments, floor,
        lambda out: [np.asarray(row)[:, :n].astype(np.float64) for row, n in zip(out, own)],
    )  # fmt: skip


def _select(name: str, shape) -> Case:
    widest = max(shape.pages)
    scores = jax.random.normal(jax.random.key(0), (len(shape.pages), shape.heads, shape.group, widest)) * 8
    rows = jnp.asarray(shape.pages, jnp.int32)
    keep = jnp.minimum(shape.keep, rows)

    def call(implementation, args):
        settings = {
            "width": min(shape.keep, widest),
            "first": shape.first,
            "last": shape.last,
            "scale": 0.125,
        }
        return page_select(*args, **settings, implementation=implementation)

    def meaningful(out) -> list[np.ndarray]:
        positions, number = (np.asarray(a) for a in out)
        return [
            p[:n].astype(np.float64) for row, counts in zip(positions, number) for p, n in zip(row, counts)
        ]

    floor = 4 * sum(shape.pages) * shape.heads * shape.group
    return Case("page_select", name, call, (scores, rows, keep), floor, meaningful)


def _bounds(name: str, shape, dtype) -> Case:
    slots: list[int] = []
    page = 0
    for start, tokens in shape.runs:
        first = start // shape.page_size
        slots += [
            (page + t // shape.page_size - first) * shape.page_size + t % shape.page_size
            for t in range(start, start + tokens)
        ]
        page += (start + tokens - 1) // shape.page_size - first + 1
    keys = jax.random.split(jax.random.key(0))
    pool = (shape.layers, max(shape.pages, page), shape.kv_heads, 2, shape.head_dim)
    bounds = jnp.sort(jax.random.normal(keys[0], pool, dtype), axis=3)
    k = jax.random.normal(keys[1], (len(slots), shape.kv_heads, shape.head_dim), dtype)

    def call(implementation, args):
        bounds, k, slots = args
        return page_bounds(bounds, 1, k, slots, page_size=shape.page_size, implementation=implementation)

    floor = (4 * page + len(slots)) * shape.kv_heads * shape.head_dim * dtype.itemsize
    return Case("page_bounds", name, call, (bounds, k, jnp.asarray(slots, jnp.int32)), floor)


def _experts(name: str, shape, dtype) -> Case:
    tokens, experts = shape.tokens, shape.experts
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, shape.model_dim), dtype)
    gate_up = jax.random.normal(keys[1], (experts, shape.model_dim, 2 * shape.hidden_dim), dtype)
    down = jax.random.normal(keys[2], (experts, shape.hidden_dim, shape.model_dim), dtype)
    gate_up, down = gate_up * shape.model_dim**-0.5, down * shape.hidden_dim**-0.5
    weights, ids = jax.lax.top_k(jax.random.uniform(keys[3], (tokens, experts)), shape.top_k)

    def call(implementation, args):
        return expert_mlp(*args, implementation=implementation)

    visited = len(np.unique(np.asarray(ids)))
    floor = 3 * visited * shape.model_dim * shape.hidden_dim * dtype.itemsize
    return Case("expert_mlp", name, call, (x, gate_up, down, ids.astype(jnp.int32), weights), floor)
