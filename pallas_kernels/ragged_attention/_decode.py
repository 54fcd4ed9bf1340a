"""One decode row and one KV head: the pages stream through once for all query heads of the group."""

from numba import types
from numba.extending import overload

from pallas_kernels._cpu.frame import argument, dimension, result
from pallas_kernels._cpu.key_code import KEYS
from pallas_kernels._cpu.memory import OPTIONS, jit, load_i32, store_f32, zero_bytes
from pallas_kernels._cpu.tiles import key_scores, stream_rows
from pallas_kernels.ragged_attention._packed import packed_scores, packed_values
from pallas_kernels.ragged_attention._rows import (
    LOWEST,
    divide_row,
    first_key,
    layer_pages,
    page_offset,
    softmax_step,
)

# Keys per step. The next step's keys and values are asked for one step ahead, some microseconds.
BLOCK = 64


@jit
def decode_item(tag, size, frame, row, head, scratch):
    heads, head_dim = dimension(frame, 0, 1), dimension(frame, 0, 2)
    group = heads // dimension(frame, 1, 2)
    table = argument(frame, 4) + 4 * row * dimension(frame, 4, 1)
    first = (load_i32(argument(frame, 5) + 4 * row) * heads + head * group) * 4 * head_dim
    q, out = argument(frame, 0) + first, result(frame, 0) + first
    end = load_i32(argument(frame, 7) + 4 * row)
    begin = first_key(frame, end - 1)
    scores, tops, totals = scratch, scratch + 4 * BLOCK * group, scratch + 4 * (BLOCK + 1) * group
    room = totals + 4 * group
    for g in range(group):
        store_f32(tops + 4 * g, LOWEST)
        store_f32(totals + 4 * g, 0.0)
    zero_bytes(out, 4 * head_dim * group)
    for block in range(begin // BLOCK * BLOCK, end, BLOCK):
        keys = min(BLOCK, end - block)
        _block_scores(tag, size, frame, table, head, block, keys, end, scores, q, group, room)
        columns = (keys + KEYS - 1) // KEYS * KEYS
        for g in range(group):
            to = out + 4 * head_dim * g
            row_scores = scores + 4 * BLOCK * g
            softmax_step(row_scores, columns, begin - block, keys, tops + 4 * g, totals + 4 * g, to, head_dim)
        _block_values(tag, size, frame, table, head, block, keys, end, scores, out, group, room)
    for g in range(group):
        divide_row(out + 4 * head_dim * g, out + 4 * head_dim * g, totals + 4 * g, head_dim)


def _block_scores(tag, size, frame, table, head, block, keys, end, scores, q, group, room):
    """As the pool's type wants it; numba chooses while compiling."""
    raise NotImplementedError("called from numba code only")


def _block_values(tag, size, frame, table, head, block, keys, end, weights, out, group, room):
    """As _block_scores."""
    raise NotImplementedError("called from numba code only")


@overload(_block_scores, jit_options=OPTIONS)
def _of_keys(tag, size, frame, table, head, block, keys, end, scores, q, group, room):
    if tag == types.uint8:
        return lambda tag, size, frame, table, head, block, keys, end, scores, q, group, room: packed_scores(
            frame, table, head, block, keys, end, scores, q, group, room, BLOCK
        )
    return lambda tag, size, frame, table, head, block, keys, end, scores, q, group, room: _scores(
        tag, size, frame, table, head, block, keys, end, scores, q, group
    )


@overload(_block_values, jit_options=OPTIONS)
def _of_values(tag, size, frame, table, head, block, keys, end, weights, out, group, room):
    if tag == types.uint8:
        return lambda tag, size, frame, table, head, block, keys, end, weights, out, group, room: (
            packed_values(frame, table, head, block, keys, end, weights, out, group, room, BLOCK)
        )
    return lambda tag, size, frame, table, head, block, keys, end, weights, out, group, room: _values(
        tag, size, frame, table, head, block, keys, end, weights, out, group
    )


@jit
def _scores(tag, size, frame, table, head, block, keys, end, scores, q, group):
    """scores[group, BLOCK] of the block's keys; prefetches the keys of the next block."""
    page_size, head_dim = dimension(frame, 1, 3), dimension(frame, 1, 4)
    k_pages = layer_pages(frame, 1, size)
    key_bytes = head_dim * size
    for key in range(0, keys, KEYS):
        at, half = block + key, block + key + KEYS // 2
        offset = page_offset(frame, table, at // page_size, head, size) + at % page_size * key_bytes
        second = offset + KEYS // 2 * key_bytes
        if half % page_size == 0:
            # Beyond the row's end the table may end too; those scores are masked, so any keys will do.
            page = half // page_size
            second = page_offset(frame, table, page, head, size) if half < block + keys else offset
        ahead = offset
        if at + BLOCK < end:
            ahead = (
                page_offset(frame, table, (at + BLOCK) // page_size, head, size) + at % page_size * key_bytes
            )
        key_scores(
            tag, scores + 4 * key, 4 * BLOCK, q, 4 * head_dim, k_pages + offset, k_pages + second, key_bytes, group,
            head_dim, k_pages + ahead,
        )  # fmt: skip


@jit
def _values(tag, size, frame, table, head, block, keys, end, weights, out, group):
    """out[group, D] += weights @ values, page by page; prefetches those of the next block."""
    page_size, head_dim = dimension(frame, 1, 3), dimension(frame, 1, 4)
    v_pages = layer_pages(frame, 2, size)
    key_bytes = head_dim * size
    for key in range(0, keys, page_size):
        at = block + key
        offset = page_offset(frame, table, at // page_size, head, size)
        ahead = offset
        if at + BLOCK < end:
            ahead = page_offset(frame, table, (at + BLOCK) // page_size, head, size)
        n = min(page_size, keys - key)
        stream_rows(
            tag, size, out, 4 * head_dim, weights + 4 * key, 4 * BLOCK, v_pages + offset, key_bytes, group, head_dim,
            n, v_pages + ahead,
        )  # fmt: skip
