"""Blocks of packed keys and values: unpacked to float32 near the core, then treated as such."""

from pallas_kernels._cpu.frame import argument, dimension
from pallas_kernels._cpu.key_code import KEYS
from pallas_kernels._cpu.memory import jit
from pallas_kernels._cpu.tiles import FLOAT32, key_scores, stream_rows, transpose_8, unpack
from pallas_kernels.ragged_attention._rows import layer_pages, page_offset

WORDS = 9  # keys' and values' words come so many arguments after the keys and the values


@jit
def packed_scores(frame, table, head, block, keys, end, scores, q, group, room, ahead):
    """scores[group, ahead] of the block's keys, which go through `room`, float32 [ahead, D]; `ahead`: keys of a block."""
    head_dim = dimension(frame, 0, 2)
    _unpack_block(frame, 1, table, head, block, keys, end, room, ahead)
    for key in range(0, keys, KEYS):
        at = room + 4 * key * head_dim
        key_scores(
            FLOAT32, scores + 4 * key, 4 * ahead, q, 4 * head_dim, at, at + 2 * KEYS * head_dim, 4 * head_dim, group,
            head_dim, at,
        )  # fmt: skip


@jit
def packed_values(frame, table, head, block, keys, end, weights, out, group, room, ahead):
    """out[group, D] += weights @ values."""
    head_dim = dimension(frame, 0, 2)
    _unpack_block(frame, 2, table, head, block, keys, end, room, ahead)
    stream_rows(
        FLOAT32, 4, out, 4 * head_dim, weights, 4 * ahead, room, 4 * head_dim, group, head_dim, keys, room
    )  # fmt: skip


@jit
def packed_pack(frame, row, head, block, count, keys, pitch, values):
    """keys: [D, pitch], values: [count, D], float32, of block .. block + count."""
    head_dim = dimension(frame, 0, 2)
    table = argument(frame, 4) + 4 * row * dimension(frame, 4, 1)
    _unpack_block(frame, 1, table, head, block, count, block + count, values, count)
    for i in range(0, count, 8):
        transpose_8(FLOAT32, keys + 4 * i, 4 * pitch, values + 4 * i * head_dim, 4 * head_dim, head_dim)
    _unpack_block(frame, 2, table, head, block, count, block + count, values, count)


@jit
def _unpack_block(frame, which, table, head, block, count, end, to, ahead):
    """to[count, D] of the keys (which 1) or values (2) of block .. block + count; asks for those `ahead` later, before end."""
    page_size, row_bytes, head_dim = dimension(frame, 1, 3), dimension(frame, 1, 4), dimension(frame, 0, 2)
    bits = 8 if row_bytes == head_dim else 4
    pages = layer_pages(frame, which, 1)
    words = argument(frame, WORDS + which) + (pages - argument(frame, which)) // row_bytes * 4
    for key in range(0, count, page_size):
        page = (block + key) // page_size
        offset = page_offset(frame, table, page, head, 1)
        next_offset = offset
        if block + key + ahead < end:
            next_offset = page_offset(frame, table, (block + key + ahead) // page_size, head, 1)
        rows = min(page_size, count - key)
        unpack(
            bits, to + 4 * key * head_dim, words + offset // row_bytes * 4, pages + offset, row_bytes, rows, head_dim,
            pages + next_offset,
        )  # fmt: skip
