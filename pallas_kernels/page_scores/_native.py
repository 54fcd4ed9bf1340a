"""The numba side of page_scores. An item is a block of pages of one row and KV head.

Arguments: signed queries [S, Hq, 2, D], bounds, layer, page_table, pages of each row and, of scaled bounds, the scales;
result: scores [S, Hq, P].
"""

import numpy as np

from pallas_kernels._cpu.code import LANES
from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result
from pallas_kernels._cpu.memory import jit, load_f32, load_i32, load_i64, store_f32, store_i64
from pallas_kernels._cpu.threads import (
    JOB,
    finish,
    invite,
    new_block,
    pool_threads,
    release,
    set_phases,
    take_item,
    task_address,
)
from pallas_kernels._cpu.tiles import BFLOAT16, FLOAT32, INT8
from pallas_kernels._cpu.vector import prefetch_line, vadd, vload, vload_as, vmuladd, vreduce_add, vsplat

BLOCK = 256
# Queries that share a load of the bounds.
TOGETHER = 4
ONE = np.float32(1)
# Pages whose bounds are asked for ahead of their turn: about a microsecond.
AHEAD = 16


def float32_handler(frame):
    """One call on float32 bounds."""
    if not answers_metadata(frame):
        _call(frame, _float32_task(), FLOAT32, 4)
    return 0


def bfloat16_handler(frame):
    """One call on bfloat16 bounds."""
    if not answers_metadata(frame):
        _call(frame, _bfloat16_task(), BFLOAT16, 2)
    return 0


def int8_handler(frame):
    """One call on scaled bounds."""
    if not answers_metadata(frame):
        _call(frame, _int8_task(), INT8, 1)
    return 0


@jit
def _call(frame, task, tag, size):
    blocks = (dimension(frame, 3, 1) + BLOCK - 1) // BLOCK
    items = dimension(frame, 0, 0) * dimension(frame, 1, 2) * blocks
    block = new_block(1)
    store_i64(block + JOB, frame)
    set_phases(block, items, 0, 0, 0)
    invite(frame, block, task, min(pool_threads(frame), items) - 1)
    _work(block, tag, size)
    finish(block)


@jit
def _work(block, tag, size):
    item = take_item(block, -1)
    if item < 0:
        return
    frame = load_i64(block + JOB)
    kv_heads, width = dimension(frame, 1, 2), dimension(frame, 3, 1)
    blocks = (width + BLOCK - 1) // BLOCK
    while item >= 0:
        row, head = item // blocks // kv_heads, item // blocks % kv_heads
        begin = item % blocks * BLOCK
        end = min(begin + BLOCK, min(width, load_i32(argument(frame, 4) + 4 * row)))
        _score_pages(tag, size, frame, row, head, begin, end)
        item = take_item(block, item)


@jit
def _score_pages(tag, size, frame, row, head, begin, end):
    q_heads, kv_heads = dimension(frame, 0, 1), dimension(frame, 1, 2)
    width, floats = dimension(frame, 3, 1), 2 * dimension(frame, 0, 3)
    group, first = q_heads // kv_heads, row * q_heads + head * (q_heads // kv_heads)
    pages, table = dimension(frame, 1, 1), argument(frame, 3) + 4 * row * width
    layer_pages = load_i32(argument(frame, 2)) * pages
    layer = argument(frame, 1) + layer_pages * kv_heads * floats * size
    scales = argument(frame, 5) + 4 * layer_pages * kv_heads if size == 1 else 0
    for page in range(begin, end):
        bounds_row = _page_row(table, page, pages, kv_heads, head)
        bounds = layer + bounds_row * floats * size
        ahead = layer + _page_row(table, min(page + AHEAD, width - 1), pages, kv_heads, head) * floats * size
        for line in range(0, floats * size, 64):
            prefetch_line(ahead + line)
        scale = load_f32(scales + 4 * bounds_row) if size == 1 else ONE
        for g in range(0, group, TOGETHER):
            query = argument(frame, 0) + (first + g) * floats * 4
            to = result(frame, 0) + ((first + g) * width + page) * 4
            if g + TOGETHER <= group:
                _four_dots(tag, size, query, bounds, floats, scale, to, 4 * width)
            else:
                for i in range(group - g):
                    score = _dot(tag, size, query + i * floats * 4, bounds, floats)
                    store_f32(to + i * width * 4, score * scale)


@jit
def _page_row(table, page, pages, kv_heads, head):
    # A bad id must not read outside of the pool.
    return min(max(load_i32(table + 4 * page), 0), pages - 1) * kv_heads + head


@jit
def _dot(tag, size, query, bounds, floats):
    """The sum over both bounds; floats is a multiple of two vectors."""
    even, odd = vsplat(0.0), vsplat(0.0)
    for i in range(0, floats, 2 * LANES):
        even = vmuladd(vload(query + 4 * i), vload_as(tag, bounds + size * i), even)
        odd = vmuladd(vload(query + 4 * (i + LANES)), vload_as(tag, bounds + size * (i + LANES)), odd)
    return vreduce_add(vadd(even, odd))


@jit
def _four_dots(tag, size, query, bounds, floats, scale, to, step):
    """Those of four queries one after the other, bit for bit as _dot's; bounds are widened once."""
    row = 4 * floats
    even_0, even_1, even_2, even_3 = vsplat(0.0), vsplat(0.0), vsplat(0.0), vsplat(0.0)
    odd_0, odd_1, odd_2, odd_3 = even_0, even_1, even_2, even_3
    for i in range(0, floats, 2 * LANES):
        at, bound = query + 4 * i, vload_as(tag, bounds + size * i)
        even_0 = vmuladd(vload(at), bound, even_0)
        even_1 = vmuladd(vload(at + row), bound, even_1)
        even_2 = vmuladd(vload(at + 2 * row), bound, even_2)
        even_3 = vmuladd(vload(at + 3 * row), bound, even_3)
        at, bound = at + 4 * LANES, vload_as(tag, bounds + size * (i + LANES))
        odd_0 = vmuladd(vload(at), bound, odd_0)
        odd_1 = vmuladd(vload(at + row), bound, odd_1)
        odd_2 = vmuladd(vload(at + 2 * row), bound, odd_2)
        odd_3 = vmuladd(vload(at + 3 * row), bound, odd_3)
    store_f32(to, vreduce_add(vadd(even_0, odd_0)) * scale)
    store_f32(to + step, vreduce_add(vadd(even_1, odd_1)) * scale)
    store_f32(to + 2 * step, vreduce_add(vadd(even_2, odd_2)) * scale)
    store_f32(to + 3 * step, vreduce_add(vadd(even_3, odd_3)) * scale)


@jit
def _float32_worker(block):
    _work(block, FLOAT32, 4)
    release(block)


@jit
def _bfloat16_worker(block):
    _work(block, BFLOAT16, 2)
    release(block)


@jit
def _int8_worker(block):
    _work(block, INT8, 1)
    release(block)


_float32_task = task_address(_float32_worker)
_bfloat16_task = task_address(_bfloat16_worker)
_int8_task = task_address(_int8_worker)
