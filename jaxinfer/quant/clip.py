"""The clipping ratio of a matrix, by search."""

from __future__ import annotations

import numpy as np

from jaxinfer.quant.form import Quantization
from jaxinfer.quant.rounding import round_nearest

GRID = tuple(1.0 - 0.05 * i for i in range(10))
MOST_ROWS = 256  # output channels that are looked at


def search_clip(weights: np.ndarray, hessian: np.ndarray, form: Quantization) -> float:
    """The ratio whose rounding changes the outputs least, as the inputs' second moments tell.

    weights [N, K] and hessian [K, K], both in the final order.
    """
    some = weights[: len(weights) // form.rows * form.rows]
    pairs = len(some) // form.rows
    chosen = np.unique(np.linspace(0, pairs - 1, min(pairs, MOST_ROWS // form.rows)).astype(int))
    some = some.reshape(pairs, form.rows, -1)[chosen].reshape(-1, weights.shape[1])
    return min(GRID, key=lambda clip: output_error(some, round_nearest(some, form, clip).weights(), hessian))


def output_error(weights: np.ndarray, rounded: np.ndarray, hessian: np.ndarray) -> float:
    """Squared change of the outputs, up to the factor that the Hessian has."""
    change = rounded - weights
    return float(np.sum((change @ hessian) * change))
