"""Keeps the smallest and the largest key of every page, channel by channel, where keys are written."""

from pallas_kernels.page_bounds.api import page_bounds
from pallas_kernels.page_bounds.scaled import Bounds, ScaledBounds, bounds_bytes, make_bounds

__all__ = ["Bounds", "ScaledBounds", "bounds_bytes", "make_bounds", "page_bounds"]
