"""Bounds from above on what a query can score in each page."""

from pallas_kernels.page_scores.api import page_scores

__all__ = ["page_scores"]
