"""The matmul of a linear layer: few rows of activations, weights that come from memory."""

from pallas_kernels.matmul.api import matmul

__all__ = ["matmul"]
