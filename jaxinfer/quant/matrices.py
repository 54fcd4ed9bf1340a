"""One linear layer from floats to packed integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxinfer.quant.clip import output_error, search_clip
from jaxinfer.quant.form import Quantization
from jaxinfer.quant.gptq import gptq
from jaxinfer.quant.qarray import QArray
from jaxinfer.quant.rounding import Rounded, round_nearest
from pallas_kernels.int4_matmul import pack

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix.

    Attributes:
      error: root of the outputs' squared change over their square, on the calibration inputs; NaN without any, or where
        all outputs are zero.
      clip: ratio that was used.
      outlier_share: of the inputs' squares, in the outlier channels: 0 where none are kept apart, NaN without any text.
    """

    name: str
    error: float
    clip: float
    outlier_share: float


def round_matrix(
    weights: np.ndarray, moments: np.ndarray | None, form: Quantization
) -> tuple[Rounded, float]:
    """The integers of a matrix [N, K] in its final order, and the clip that was used.

    moments: X^T X [K, K] of its rounded inputs; None, or all zero where no input was ever seen: round to nearest.
    """
    seen = moments is not None and bool(np.any(moments))
    clip = form.weight_clip
    if clip == 0:
        clip = search_clip(weights, moments, form) if seen and moments is not None else 1.0
    if form.method == "gptq" and form.weight_bits == 4 and seen and moments is not None:
        return gptq(weights, moments, form, clip), clip
    return round_nearest(weights, form, clip), clip


def relative_error(weights: np.ndarray, rounded: Rounded, moments: np.ndarray | None) -> float:
    """See `MatrixReport.error`; on at most 256 output channels."""
    if moments is None or not np.any(moments):
        return math.nan
    some = np.unique(np.linspace(0, len(weights) - 1, min(len(weights), 256)).astype(int))
    was, now = weights[some].astype(np.float64), rounded.weights()[some]
    size = output_error(was, np.zeros_like(was), moments)
    return math.sqrt(max(0.0, output_error(was, now, moments)) / size) if size > 0 else math.nan


def packed(
    rounded: list[Rounded], order: np.ndarray | None, inputs: Shape, outputs: Shape, form: Quantization
) -> QArray:
    """A QArray of numpy arrays from one matrix, or from those of all experts (axis E in front)."""
    group = form.group_of(math.prod(inputs))

    def joined(name: str):
        parts = [getattr(matrix, name) for matrix in rounded]
        if parts[0] is None or parts[0].size == 0:
            return None
        if name == "codes":
            parts = [pack(part, group) for part in parts]
        return np.stack(parts)

    arrays = {"low": joined("codes")} | {
        name: joined(name) for name in ("scale", "channel", "high", "high_scale")
    }
    if order is not None:
        arrays["order"] = np.broadcast_to(order, (len(rounded), len(order)))
    else:
        arrays["order"] = None
    return QArray(**arrays, inputs=inputs, outputs=outputs, form=form)
