"""Quantizes a decoder layer by layer: two streams of calibration text run through it, one through the layers as they were,
one through the layers as they become."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxinfer.errors import ModelError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Layer, MoE
from jaxinfer.quant.form import Quantization
from jaxinfer.quant.matrices import MatrixReport, packed, relative_error, round_matrix
from jaxinfer.quant.order import channel_order, outlier_share
from jaxinfer.quant.rotation import rotate_weights
from jaxinfer.quant.smoothing import TOKENS, key_scales, smoothed
from jaxinfer.quant.step import Orders, Step
from jaxinfer.quant.watch import MATRICES


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
      drift: root of the squared difference of both streams after it over the square of the plain one; NaN without text,
        or where that is zero.
    """

    index: int
    matrices: tuple[MatrixReport, ...]
    drift: float


def quantize_layers(
    config: ModelConfig,
    form: Quantization,
    embedding: np.ndarray,
    layers: Iterable[Layer],
    windows: np.ndarray,
    kept: Callable[[int], tuple[Layer, LayerReport] | None] = lambda index: None,
) -> Iterator[tuple[Layer, LayerReport]]:
    """Every layer with `QArray`s of numpy arrays in the place of its weights, and what became of it.

    As the authors do: channels are ordered by the plain model's inputs; Hessians are of the rounded inputs that the
    quantized model gives, all of a layer's at once; then the text runs through the layer as it now is.

    Args:
      config: of the plain model.
      embedding: [V, D].
      layers: plain float arrays, one after another; asked for as they are needed.
      windows: int32 [n, T] token ids; [0, 0] without text, which only forms that need none allow.
      kept: a layer that was quantized by an earlier run, or None.

    Raises:
      ModelError: weights that are not finite, by their name, or that make inputs of a layer so.
    """
    plain = [embedding[ids].astype(np.float32) for ids in windows]
    rounded = list(plain)
    step = Step(config, windows.shape[1]) if len(windows) else None
    for index, layer in enumerate(layers):
        earlier = kept(index)
        layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), layer)
        _check_finite(index, layer)
        if step and form.smooth_keys:
            layer = smoothed(layer, _key_scales(step, layer, plain))
        if earlier is None:
            statistics = _summed(index, (step.statistics(layer, x, index) for x in plain)) if step else {}
            orders = _orders(layer, statistics, form)
            arranged = arrange(layer, orders, form)
            inputs = {name: order for name, order in orders.items() if name != "mlp.down"}
            moments: dict[str, np.ndarray] = {}
            if step and form.needs_text:
                moments = _summed(index, (step.moments(arranged, x, index, inputs, form) for x in rounded))
            new, matrices = _round(layer, arranged, orders, statistics, moments, form)
        else:
            new, report = earlier
        drift = math.nan
        if step:
            plain = [step.run(layer, x, index) for x in plain]
            rounded = [step.run(new, x, index) for x in rounded]
            difference = sum(float(np.square(a - b).sum()) for a, b in zip(plain, rounded))
            size = sum(float(np.square(a).sum()) for a in plain)
            drift = math.sqrt(difference / size) if size > 0 else math.nan
        yield (new, LayerReport(index, matrices, drift)) if earlier is None else (new, report)


def _key_scales(step: Step, layer: Layer, hidden: list[np.ndarray]) -> np.ndarray:
    seen = hidden[: max(TOKENS // step.length, 1)]
    return key_scales(np.concatenate([step.keys(layer, x) for x in seen]), step.config)


def arrange(layer: Layer, orders: Orders, form: Quantization) -> Layer:
    """A plain layer as rounded inputs meet it: weights rotated; channels between gate, up and down in down's order."""
    arranged = jax.tree.map(lambda leaf: leaf, layer)
    if form.rotate:
        for name in MATRICES:
            part, leaf = name.split(".")
            block = getattr(arranged, part)
            weights = getattr(block, leaf)
            setattr(block, leaf, _rotated(name, weights, isinstance(layer.mlp, MoE)))
    order = orders.get("mlp.down")
    if order is not None:
        mlp = arranged.mlp
        if isinstance(mlp, MoE):
            pairs = list(zip(mlp.gate_up, mlp.down, order))
            mlp.gate_up = np.stack([gate_up[..., own] for gate_up, _, own in pairs])
            mlp.down = np.stack([down[own] for _, down, own in pairs])
        else:
            mlp.gate_up, mlp.down = mlp.gate_up[..., order], mlp.down[order]
            if mlp.gate_up_bias is not None:
                mlp.gate_up_bias = mlp.gate_up_bias[..., order]
    return arranged


def _rotated(name: str, weights: np.ndarray, experts: bool) -> np.ndarray:
    matrices, _, _ = _as_matrices(name, weights, experts)
    return np.stack([rotate_weights(matrix).T for matrix in matrices]).reshape(weights.shape)


def _as_matrices(name: str, weights: np.ndarray, experts: bool) -> tuple[np.ndarray, Any, Any]:
    """[E, N, K] (E is 1 where there are no experts), and the axes of its inputs and outputs."""
    own = weights if experts and name.startswith("mlp.") else weights[None]
    inputs = own.shape[1 : 1 + MATRICES[name]]
    outputs = own.shape[1 + MATRICES[name] :]
    return own.reshape(len(own), math.prod(inputs), -1).swapaxes(1, 2), inputs, outputs


def _orders(layer: Layer, statistics: dict[str, np.ndarray], form: Quantization) -> Orders:
    """Of every matrix's input channels; [E, F] for the experts' down projections. Experts share that of gate and up."""
    if not form.reorder:
        return {}
    row = 0 if form.statistic == "squares" else 1
    orders = {}
    for name, noted in statistics.items():
        if noted.ndim == 2:
            orders[name] = channel_order(noted[row])
        elif name == "mlp.gate_up":
            orders[name] = channel_order(noted[:, row].sum(0))
        else:
            orders[name] = np.stack([channel_order(own) for own in noted[:, row]])
    return orders


def _round(
    layer: Layer,
    arranged: Layer,
    orders: Orders,
    statistics: dict[str, np.ndarray],
    moments: dict[str, np.ndarray],
    form: Quantization,
) -> tuple[Layer, tuple[MatrixReport, ...]]:
    new = jax.tree.map(lambda leaf: leaf, arranged)
    several = isinstance(layer.mlp, MoE)
    reports = []
    for name in MATRICES:
        part, leaf = name.split(".")
        experts = several and part == "mlp"
        matrices, inputs, outputs = _as_matrices(name, getattr(getattr(arranged, part), leaf), experts)
        order = orders.get(name) if name != "mlp.down" else None
        if order is not None:
            matrices = matrices[:, :, order]
        seen = _of_experts(moments.get(name), len(matrices), form)
        rounded = []
        for expert, (matrix, own) in enumerate(zip(matrices, seen)):
            integers, clip = round_matrix(matrix, own, form)
            rounded.append(integers)
            noted = statistics.get(name)
            squares = None if noted is None else noted[expert, 0] if noted.ndim == 3 else noted[0]
            apart = math.nan if squares is None else outlier_share(squares, form.outliers)
            label = f"{name}.{expert}" if experts else name
            reports.append(MatrixReport(label, relative_error(matrix, integers, own), clip, apart))
        array = packed(rounded, order, inputs, outputs, form)
        if not experts:
            array = jax.tree.map(lambda leaf: leaf[0], array)
        setattr(getattr(new, part), leaf, nnx.data(array))
    return new, tuple(reports)


def _of_experts(moments: np.ndarray | None, count: int, form: Quantization) -> list[np.ndarray | None]:
    """Second moments of each matrix. An expert's own are helped by a little of all experts' (the share that GPTQ adds to the
    diagonal), so that channels which its few tokens leave at zero still count."""
    if moments is None:
        return [None] * count
    if moments.ndim == 2:
        return [moments]
    everybody = moments.sum(0) * form.damping
    return [own + everybody for own in moments]


def _summed(index: int, parts: Iterable[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for part in parts:
        for name, noted in part.items():
            wide = np.asarray(noted, np.float64)
            total[name] = total[name] + wide if name in total else wide
    for name, summed in total.items():
        if not np.isfinite(summed).all():
            raise ModelError(
                f"layers.{index}.{name}: the calibration text gives it inputs that are NaN or too large for float32; "
                "look at the norm before it, the layers before, and embed"
            )
    return total


def _check_finite(index: int, layer: Layer) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(layer):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ModelError(
                f"layers.{index}.{name}: holds NaN or infinite weights; they cannot be quantized"
            )
