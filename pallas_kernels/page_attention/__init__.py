"""Attention of decoding tokens over lists of pages, one list per row and head: chosen pages, or all."""

from pallas_kernels.page_attention.api import page_attention

__all__ = ["page_attention"]
