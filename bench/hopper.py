"""An H200 as predictions take it, and what a kernel takes of one of its processors."""

from __future__ import annotations

import importlib.util

from pallas_kernels._h200.apart import compile_apart
from pallas_kernels._h200.report import Failure

# In cycles of one processor: bfloat16 operations, exponentials; and bytes a second of all of them.
PROCESSORS, CLOCK = 132, 1.83e9
OPERATIONS, EXPONENTIALS = 4096, 16
PEAK = OPERATIONS * PROCESSORS * CLOCK
BANDWIDTH = 0.85 * 4.8e12
# Assumed, to be measured: bytes a second from the second-level cache, 27 a cycle and processor; share of the bandwidth with one
# reading block to a processor; of the tensor cores' peak in large matrix products, as in `schedule.profile.H200`.
CACHE = 27 * PROCESSORS * CLOCK
ONE_READER = 0.9
OF_PEAK_PRODUCTS = 0.7
LAYER_PARAMETERS = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336  # of Llama-3-8B


def layer_products(tokens: int) -> float:
    """Seconds of the matrix products of a layer of Llama-3-8B in bfloat16."""
    return 2 * tokens * LAYER_PARAMETERS / (OF_PEAK_PRODUCTS * PEAK)


def occupancy(case: str) -> dict[str, float]:
    """What the kernel of a case takes of a processor; nothing where the compiler is not installed (`make h200` installs it)."""
    plugins = ("jax_plugins", "jax_plugins.xla_cuda13")
    if any(importlib.util.find_spec(name) is None for name in plugins):
        return {}
    try:
        kernels, _ = compile_apart(case)
    except Failure as failure:
        print(f"{case} does not compile for the H200: {failure}")
        return {}
    kernel = kernels[-1]
    return {
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "shared_bytes": kernel.shared_bytes,
        "blocks_per_processor": kernel.blocks_per_processor,
    }
