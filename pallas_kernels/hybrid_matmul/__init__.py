"""A matrix product of some tokens beside the decode attention of others."""

from pallas_kernels.hybrid_matmul.api import hybrid_matmul

__all__ = ["hybrid_matmul"]
