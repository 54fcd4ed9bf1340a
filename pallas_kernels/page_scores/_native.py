"""The numba side of page_scores. An item is a block of pages of one row and KV head.

Arguments: signed queries [S, Hq, 2, D], bounds, layer, page_table, pages of each row; result: scores [S, Hq, P].
"""

from pallas_kernels._cpu.code import LANES
from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result
from pallas_kernels._cpu.memory import jit, load_i32, load_i64, store_f32, store_i64
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
from pallas_kernels._cpu.tiles import BFLOAT16, FLOAT32
from pallas_kernels._cpu.vector import prefetch_line, vadd, vload, vload_as, vmuladd, vreduce_add, vsplat

BLOCK = 256
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
    layer = argument(frame, 1) + load_i32(argument(frame, 2)) * pages * kv_heads * floats * size
    for page in range(begin, end):
        bounds = layer + _page_row(table, page, pages, kv_heads, head) * floats * size
        ahead = layer + _page_row(table, min(page + AHEAD, width - 1), pages, kv_heads, head) * floats * size
        for line in range(0, floats * size, 64):
            prefetch_line(ahead + line)
        for g in range(group):
            query = argument(frame, 0) + (first + g) * floats * 4
            score = _dot(tag, size, query, bounds, floats)
            store_f32(result(frame, 0) + ((first + g) * width + page) * 4, score)


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
def _float32_worker(block):
    _work(block, FLOAT32, 4)
    release(block)


@jit
def _bfloat16_worker(block):
    _work(block, BFLOAT16, 2)
    release(block)


_float32_task = task_address(_float32_worker)
_bfloat16_task = task_address(_bfloat16_worker)
