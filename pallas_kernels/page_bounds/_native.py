"""The numba side of page_bounds. Arguments: bounds, keys around themselves, layer, slots, page size; result: bounds, aliased."""

from pallas_kernels._cpu.code import LANES
from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result
from pallas_kernels._cpu.memory import copy_bytes, jit, load_i32
from pallas_kernels._cpu.tiles import BFLOAT16, FLOAT32
from pallas_kernels._cpu.vector import vload_as, vmax, vmin, vstore_as


def float32_handler(frame):
    """One call on float32 bounds."""
    if not answers_metadata(frame):
        _fold_all(frame, FLOAT32, 4)
    return 0


def bfloat16_handler(frame):
    """One call on bfloat16 bounds."""
    if not answers_metadata(frame):
        _fold_all(frame, BFLOAT16, 2)
    return 0


@jit
def _fold_all(frame, tag, size):
    pages, heads, dim = dimension(frame, 0, 1), dimension(frame, 0, 2), dimension(frame, 0, 4)
    row_bytes = dim * size
    layer = result(frame, 0) + load_i32(argument(frame, 2)) * pages * heads * 2 * row_bytes
    slots, page_size = argument(frame, 3), load_i32(argument(frame, 4))
    for token in range(dimension(frame, 3, 0)):
        slot = load_i32(slots + 4 * token)
        if slot >= 0 and slot < pages * page_size:
            page = slot // page_size
            to = layer + page * heads * 2 * row_bytes
            key = argument(frame, 1) + token * heads * 2 * row_bytes
            if slot == page * page_size:
                copy_bytes(to, key, heads * 2 * row_bytes)
            else:
                for at in range(0, heads * 2 * row_bytes, 2 * row_bytes):
                    _fold(tag, size, to + at, key + at, dim)


@jit
def _fold(tag, size, bounds, key, dim):
    high = dim * size
    for d in range(0, dim * size, LANES * size):
        vstore_as(tag, bounds + d, vmin(vload_as(tag, key + d), vload_as(tag, bounds + d)))
        largest = vmax(vload_as(tag, key + high + d), vload_as(tag, bounds + high + d))
        vstore_as(tag, bounds + high + d, largest)
