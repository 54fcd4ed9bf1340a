"""Calls of int4_matmul and quantize for `python -m bench kernels`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernel_case import Case
from pallas_kernels.int4_matmul import PackedMatrix, int4_matmul
from pallas_kernels.int4_matmul.shapes import ON_GPU, SHAPES, LowBitShape
from pallas_kernels.quantize import Gated, Inputs, Normed, QuantizedRows, quantize
from pallas_kernels.quantize.shapes import ON_GPU as ROUNDED
from pallas_kernels.quantize.shapes import QuantizeShape

MODES = ("w4a8", "w4a4", "w4a16")


def by_name(dtype) -> dict[str, Callable[[], Case]]:
    """All of this platform; the arrays of one case at a time."""
    on_cpu = jax.default_backend() == "cpu"
    made: dict[str, Callable[[], Case]] = {}
    for name, shape in (SHAPES if on_cpu else ON_GPU).items():
        for mode in MODES:
            made[f"int4_matmul {name} {mode}"] = partial(_matmul, name, shape, mode, dtype)
    for name, rounded in {} if on_cpu else ROUNDED.items():
        made[f"quantize {name}"] = partial(_quantize, name, rounded, dtype)
    return made


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def operands(shape: LowBitShape, mode: str, dtype) -> tuple[QuantizedRows, PackedMatrix]:
    """Random x and w of int4_matmul; rows are rounded from `dtype`."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    lead, low, n = (shape.experts,) if shape.experts else (), shape.inputs - shape.outliers, shape.outputs
    groups, channel = low // shape.group, None
    scale = jax.random.uniform(next(keys), (*lead, n // (2 if mode == "w4a4" else 1), groups))
    if mode == "w4a8":
        channel = jnp.full((*lead, n), 1e-4)
        scale = (1 + 14 * scale).astype(jnp.uint8)
    high = jax.random.randint(next(keys), (*lead, n, shape.outliers), -127, 128).astype(jnp.int8)
    matrix = PackedMatrix(
        jax.random.bits(next(keys), (*lead, n, low // 2), jnp.uint8),
        scale,
        channel,
        high if shape.outliers else None,
        jnp.full((*lead, n), 1e-3) if shape.outliers else None,
    )
    x = jax.random.normal(next(keys), (shape.rows, shape.inputs), dtype)
    rows = QuantizedRows(x, None, None, None)
    if mode != "w4a16":
        bits, group = (8, 0) if mode == "w4a8" else (4, shape.group)
        rows = quantize(x, bits=bits, group=group, outliers=shape.outliers, implementation="xla")
    return rows, matrix


def _matmul(name: str, shape: LowBitShape, mode: str, dtype) -> Case:
    if mode == "w4a16":
        shape = dataclasses.replace(shape, outliers=0)
    rows, matrix = operands(shape, mode, dtype)
    sizes = None
    if shape.experts:
        shares = np.full(shape.experts, shape.rows // shape.experts)
        shares[: shape.rows % shape.experts] += 1
        sizes = jnp.asarray(shares, jnp.int32)

    def call(implementation, args):
        return int4_matmul(*args, implementation=implementation)

    floor = _bytes((rows, matrix)) + 4 * shape.rows * shape.outputs
    return Case("int4_matmul", f"{name} {mode}", call, (rows, matrix, sizes), floor)


def _quantize(name: str, shape: QuantizeShape, dtype) -> Case:
    keys = jax.random.split(jax.random.key(0), 3)
    parts = (2,) if shape.before == "gated" else ()
    plain = jax.random.normal(keys[0], (shape.rows, *parts, shape.channels), dtype)
    x: Inputs = plain
    order: jax.Array | None = jax.random.permutation(keys[1], shape.channels).astype(jnp.int32)
    if shape.before == "gated":
        x, order = Gated(plain, jax.nn.silu), None
    elif shape.before == "normed":
        x = Normed(plain, jnp.ones(shape.channels, dtype), 1e-5)

    def call(implementation, args):
        return quantize(*args, **shape.settings, implementation=implementation)

    floor = _bytes((x, order)) + shape.rows * shape.channels
    return Case("quantize", name, call, (x, order), floor, _codes_and_scales)


def _codes_and_scales(out: QuantizedRows) -> list[np.ndarray]:
    return [np.asarray(part, np.float64) for part in out if part is not None]
