"""The routed experts of one layer, each of them one record of bytes: floating, or integers with scales.

A record can be mapped from a file, computed where it lies (`host`), copied to a slot on the device, and computed there.
"""

from pallas_kernels.packed_experts.api import packed_experts
from pallas_kernels.packed_experts.layout import GROUP, Record

__all__ = ["GROUP", "Record", "packed_experts"]
