"""Writes new keys and values into the paged pool, in place."""

from pallas_kernels.kv_write.api import kv_write

__all__ = ["kv_write"]
