"""One tile of a prefill row and one KV head: FlashAttention-2 with the keys packed for register tiles."""

from numba import types
from numba.extending import overload

from pallas_kernels._cpu.frame import argument, dimension, result
from pallas_kernels._cpu.memory import OPTIONS, copy_bytes, jit, load_i32, store_f32, zero_bytes
from pallas_kernels._cpu.tiles import matmul, transpose_8, widen
from pallas_kernels.ragged_attention._packed import packed_pack
from pallas_kernels.ragged_attention._rows import (
    LOWEST,
    divide_row,
    first_key,
    layer_pages,
    page_offset,
    softmax_step,
)
from pallas_kernels.ragged_attention.cpu import PREFILL_KEYS


@jit
def prefill_item(tag, size, frame, row, tile, head, scratch):
    heads, head_dim = dimension(frame, 0, 1), dimension(frame, 0, 2)
    group = heads // dimension(frame, 1, 2)
    length, kv_len = load_i32(argument(frame, 6) + 4 * row), load_i32(argument(frame, 7) + 4 * row)
    tile_tokens = load_i32(argument(frame, 9))
    skip = tile * tile_tokens
    tokens = min(tile_tokens, length - skip)
    token = load_i32(argument(frame, 5) + 4 * row) + skip
    rows, first_position = tokens * group, kv_len - length + skip
    end = first_position + tokens

    row_bytes = 4 * head_dim
    q = scratch
    out = q + rows * row_bytes
    scores = out + rows * row_bytes
    tops = scores + 4 * rows * PREFILL_KEYS
    totals = tops + 4 * rows
    keys = totals + 4 * rows
    values = keys + 4 * PREFILL_KEYS * head_dim
    for t in range(tokens):
        source = argument(frame, 0) + ((token + t) * heads + head * group) * row_bytes
        copy_bytes(q + t * group * row_bytes, source, group * row_bytes)
    zero_bytes(out, rows * row_bytes)
    for r in range(rows):
        store_f32(tops + 4 * r, LOWEST)
        store_f32(totals + 4 * r, 0.0)

    for block in range(first_key(frame, first_position) // PREFILL_KEYS * PREFILL_KEYS, end, PREFILL_KEYS):
        count = min(PREFILL_KEYS, (end - block + 7) // 8 * 8)
        _pack_block(tag, size, frame, row, head, block, count, keys, values)
        if end - block < count:
            # Nobody has written these yet: what lies there need not be finite, and NaN times a weight of 0 is NaN.
            zero_bytes(values + (end - block) * row_bytes, (count - end + block) * row_bytes)
        # Queries before the block see none of it; a window may end before it for the last ones, which costs little.
        r = max(0, block - first_position) * group
        at, ldb = scores + 4 * r * PREFILL_KEYS, 4 * PREFILL_KEYS
        matmul(at, ldb, q + r * row_bytes, row_bytes, keys, ldb, rows - r, count, head_dim, 0)
        _softmax(frame, block, count, first_position, group, r, rows, scores, tops, totals, out, head_dim)
        matmul(out + r * row_bytes, row_bytes, at, ldb, values, row_bytes, rows - r, head_dim, count, 1)

    for r in range(rows):
        to = result(frame, 0) + ((token + r // group) * heads + head * group + r % group) * row_bytes
        divide_row(to, out + r * row_bytes, totals + 4 * r, head_dim)


@jit
def _softmax(frame, block, count, first_position, group, begin, rows, scores, tops, totals, out, head_dim):
    for r in range(begin, rows):
        position = first_position + r // group
        low, high = first_key(frame, position) - block, min(count, position + 1 - block)
        row_scores = scores + 4 * r * PREFILL_KEYS
        # Whole vectors: count is a multiple of 8 only, what lies past it is masked by high.
        softmax_step(
            row_scores, count, low, high, tops + 4 * r, totals + 4 * r, out + 4 * r * head_dim, head_dim
        )


def _pack_block(tag, size, frame, row, head, block, count, keys, values):
    """As the pool's type wants it; numba chooses while compiling."""
    raise NotImplementedError("called from numba code only")


@overload(_pack_block, jit_options=OPTIONS)
def _of_pool(tag, size, frame, row, head, block, count, keys, values):
    if tag == types.uint8:
        return lambda tag, size, frame, row, head, block, count, keys, values: packed_pack(
            frame, row, head, block, count, keys, PREFILL_KEYS, values
        )
    return lambda tag, size, frame, row, head, block, count, keys, values: _pack(
        tag, size, frame, row, head, block, count, keys, values
    )


@jit
def _pack(tag, size, frame, row, head, block, count, keys, values):
    """keys: [D, PREFILL_KEYS], values: [count, D], float32, from the pages that hold block .. block + count."""
    page_size, head_dim = dimension(frame, 1, 3), dimension(frame, 1, 4)
    table = argument(frame, 4) + 4 * row * dimension(frame, 4, 1)
    k_pages, v_pages = layer_pages(frame, 1, size), layer_pages(frame, 2, size)
    key_bytes = head_dim * size
    for i in range(0, count, 8):
        at = block + i
        offset = page_offset(frame, table, at // page_size, head, size) + at % page_size * key_bytes
        transpose_8(tag, keys + 4 * i, 4 * PREFILL_KEYS, k_pages + offset, key_bytes, head_dim)
        widen(tag, values + 4 * i * head_dim, v_pages + offset, 8 * head_dim)
