"""Matmuls with weights of 4 and 8 bits that stay packed in memory."""

from pallas_kernels.int4_matmul.api import int4_matmul
from pallas_kernels.int4_matmul.matrix import PackedMatrix, pack, unpack

__all__ = ["PackedMatrix", "int4_matmul", "pack", "unpack"]
