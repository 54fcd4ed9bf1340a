"""Causal attention of ragged rows (prefill chunks and decode tokens together) over the paged pool."""

from pallas_kernels.ragged_attention.api import ragged_attention

__all__ = ["ragged_attention"]
