"""The numba side of ragged_attention: the list of items and the handlers.

An item is a KV head of a decode row, or of a tile of a prefill row. Arguments: q (scaled), k_pages, v_pages, layer,
page_table, query_start, query_len, kv_len, window, tokens of a prefill tile, then the words of packed keys and values. Results: out; list of (row, tile), then
a mark for every token that a row owns; scratch per worker.
"""

from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result, result_dimension
from pallas_kernels._cpu.memory import jit, load_i32, load_i64, store_i32, store_i64, zero_bytes
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
from pallas_kernels.ragged_attention._prefill import prefill_item


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
    tokens, row_bytes = dimension(frame, 0, 0), 4 * dimension(frame, 0, 1) * dimension(frame, 0, 2)
    items = _list_items(frame) * dimension(frame, 1, 2)
    owned = result(frame, 1) + 4 * (result_dimension(frame, 1, 0) - tokens)
    for token in range(tokens):
        if load_i32(owned + 4 * token) == 0:
            zero_bytes(result(frame, 0) + token * row_bytes, row_bytes)
    block = new_block(1)
    store_i64(block + JOB, frame)
    set_phases(block, items, 0, 0, 0)
    invite(frame, block, task, min(pool_threads(frame), result_dimension(frame, 2, 0), items) - 1)
    _work(block, tag, size)
    finish(block)


@jit
def _list_items(frame):
    """Fills in (row, tile), prefill first as its items are the long ones, and the marks; returns how many."""
    tokens, tile_tokens = dimension(frame, 0, 0), load_i32(argument(frame, 9))
    items, words = result(frame, 1), result_dimension(frame, 1, 0) - tokens
    owned = items + 4 * words
    zero_bytes(owned, 4 * tokens)
    count = 0
    for decode in range(2):
        for row in range(dimension(frame, 6, 0)):
            length = load_i32(argument(frame, 6) + 4 * row)
            if (length == 1) != (decode == 1) or not _is_sound(frame, row, length):
                continue
            start = load_i32(argument(frame, 5) + 4 * row)
            # The last tile sees the most keys, so it goes first.
            for tile in range((length - 1) // tile_tokens, -1, -1):
                if 2 * count < words:
                    store_i32(items + 8 * count, row)
                    store_i32(items + 8 * count + 4, tile)
                    count += 1
            for token in range(start, start + length):
                store_i32(owned + 4 * token, 1)
    return count


@jit
def _is_sound(frame, row, length):
    """A row that lies within its arrays; others, padding among them, are left out."""
    start, kv_len = load_i32(argument(frame, 5) + 4 * row), load_i32(argument(frame, 7) + 4 * row)
    room = dimension(frame, 4, 1) * dimension(frame, 1, 3)
    return length > 0 and start >= 0 and start + length <= dimension(frame, 0, 0) and length <= kv_len <= room


@jit
def _work(block, tag, size):
    item = take_item(block, -1)
    if item < 0:
        return
    frame = load_i64(block + JOB)
    kv_heads, items = dimension(frame, 1, 2), result(frame, 1)
    scratch = result(frame, 2) + 4 * result_dimension(frame, 2, 1) * worker_number(block)
    while item >= 0:
        entry, head = items + 8 * (item // kv_heads), item % kv_heads
        row, tile = load_i32(entry), load_i32(entry + 4)
        if load_i32(argument(frame, 6) + 4 * row) == 1:
            decode_item(tag, size, frame, row, head, scratch)
        else:
            prefill_item(tag, size, frame, row, tile, head, scratch)
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
