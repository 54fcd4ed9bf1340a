"""Keeps the smallest and the largest key of every page, channel by channel, where keys are written."""

from pallas_kernels.page_bounds.api import page_bounds

__all__ = ["page_bounds"]
