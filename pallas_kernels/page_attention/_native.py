"""The numba side of page_attention. An item is a row and a KV head.

Arguments, as decode_item of ragged_attention reads them: q (scaled), k_pages, v_pages, layer, lists of pages, row of
each list, lists per row, tokens of each list, a window of 0, one more number, then the words of packed keys and values. Results: out; scratch per worker.
"""

from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result, result_dimension
from pallas_kernels._cpu.memory import jit, load_i32, load_i64, store_i64
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
    worker_number,
)
from pallas_kernels._cpu.tiles import BFLOAT16, FLOAT32, PACKED
from pallas_kernels.ragged_attention._decode import decode_item


def float32_handler(frame):
    """One call on float32 pools."""
    if not answers_metadata(frame):
        _call(frame, _float32_task(), FLOAT32, 4)
    return 0


def bfloat16_handler(frame):
    """One call on bfloat16 pools."""
    if not answers_metadata(frame):
        _call(frame, _bfloat16_task(), BFLOAT16, 2)
    return 0


def packed_handler(frame):
    """One call on packed pools."""
    if not answers_metadata(frame):
        _call(frame, _packed_task(), PACKED, 1)
    return 0


@jit
def _call(frame, task, tag, size):
    items = dimension(frame, 0, 0) * dimension(frame, 1, 2)
    block = new_block(1)
    store_i64(block + JOB, frame)
    set_phases(block, items, 0, 0, 0)
    invite(frame, block, task, min(pool_threads(frame), result_dimension(frame, 1, 0), items) - 1)
    _work(block, tag, size)
    finish(block)


@jit
def _work(block, tag, size):
    item = take_item(block, -1)
    if item < 0:
        return
    frame = load_i64(block + JOB)
    kv_heads, lists = dimension(frame, 1, 2), load_i32(argument(frame, 6))
    scratch = result(frame, 1) + 4 * result_dimension(frame, 1, 1) * worker_number(block)
    while item >= 0:
        row, head = item // kv_heads, item % kv_heads
        decode_item(tag, size, frame, row * lists + (head if lists > 1 else 0), head, scratch)
        item = take_item(block, item)


@jit
def _float32_worker(block):
    _work(block, FLOAT32, 4)
    release(block)


@jit
def _bfloat16_worker(block):
    _work(block, BFLOAT16, 2)
    release(block)


@jit
def _packed_worker(block):
    _work(block, PACKED, 1)
    release(block)


_float32_task = task_address(_float32_worker)
_bfloat16_task = task_address(_bfloat16_worker)
_packed_task = task_address(_packed_worker)
