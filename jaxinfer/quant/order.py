"""In which order a matrix takes its input channels."""

from __future__ import annotations

import numpy as np


def channel_order(statistic: np.ndarray) -> np.ndarray:
    """Channels by ascending magnitude, equal ones as they were: the outliers come last. float [K] -> int32 [K]."""
    return np.argsort(statistic, kind="stable").astype(np.int32)


def outlier_share(statistic: np.ndarray, outliers: int) -> float:
    """Share of the statistic's sum that the largest channels hold."""
    total = float(statistic.sum())
    return float(np.sort(statistic)[len(statistic) - outliers :].sum()) / total if total > 0 else 0.0
