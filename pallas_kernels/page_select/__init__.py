"""Chooses the pages that a decoding token attends to, by their scores."""

from pallas_kernels.page_select.api import Selected, page_select

__all__ = ["Selected", "page_select"]
