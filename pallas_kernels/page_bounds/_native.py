"""The numba side of page_bounds.

Arguments: bounds, keys around themselves, layer, slots, page size; result: bounds, aliased. Of scaled bounds: values, keys
in float32, layer, slots, page size, scales; results: values and scales, aliased.
"""

import numpy as np

from pallas_kernels._cpu.code import LANES
from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result
from pallas_kernels._cpu.memory import (
    copy_bytes,
    float_bits,
    float_of_bits,
    jit,
    load_f32,
    load_i32,
    store_f32,
)
from pallas_kernels._cpu.tiles import BFLOAT16, FLOAT32, INT8
from pallas_kernels._cpu.vector import (
    vfloor,
    vload,
    vload_as,
    vmax,
    vmin,
    vmul,
    vreduce_max,
    vsplat,
    vstore_as,
    vsub,
)
from pallas_kernels.page_bounds.scaled import SMALLEST_SCALE

ONE, SIXTY_FOURTH, LEAST = np.float32(1), np.float32(1 / 64), np.float32(SMALLEST_SCALE)


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


def int8_handler(frame):
    """One call on scaled bounds."""
    if not answers_metadata(frame):
        _fold_all_scaled(frame)
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


@jit
def _fold_all_scaled(frame):
    pages, heads, dim = dimension(frame, 0, 1), dimension(frame, 0, 2), dimension(frame, 0, 4)
    first = load_i32(argument(frame, 2)) * pages * heads
    slots, page_size = argument(frame, 3), load_i32(argument(frame, 4))
    for token in range(dimension(frame, 3, 0)):
        slot = load_i32(slots + 4 * token)
        if slot >= 0 and slot < pages * page_size:
            page = slot // page_size
            for head in range(heads):
                row = first + page * heads + head
                key = argument(frame, 1) + (token * heads + head) * dim * 4
                anew = slot == page * page_size
                _fold_scaled(result(frame, 0) + row * 2 * dim, result(frame, 1) + 4 * row, key, dim, anew)


@jit
def _fold_scaled(values, scale_at, key, dim, anew):
    scale, before = _scale_for(key, dim), load_f32(scale_at)
    if not anew:
        scale = max(scale, before)
    store_f32(scale_at, scale)
    zero, finer, coarser = vsplat(0.0), vsplat(ONE / scale), vsplat(before / scale)
    for d in range(0, dim, LANES):
        low = vmul(vload(key + 4 * d), finer)
        high = vsub(zero, low)  # both bounds as minima
        low, high = vfloor(low), vfloor(high)
        if not anew:
            low = vmin(low, vfloor(vmul(vload_as(INT8, values + d), coarser)))
            held = vsub(zero, vload_as(INT8, values + dim + d))
            high = vmin(high, vfloor(vmul(held, coarser)))
        vstore_as(INT8, values + d, low)
        vstore_as(INT8, values + dim + d, vsub(zero, high))


@jit
def _scale_for(key, dim):
    """See `scaled.scale_for`."""
    zero = vsplat(0.0)
    largest = zero
    for d in range(0, dim, LANES):
        value = vload(key + 4 * d)
        largest = vmax(vmax(value, vsub(zero, value)), largest)
    bits = (float_bits(vreduce_max(largest)) + 0x1FFFF) & 0x7F800000
    return max(float_of_bits(bits) * SIXTY_FOURTH, LEAST)
