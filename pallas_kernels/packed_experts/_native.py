"""The numba side of packed_experts: the phases and work arrays of expert_mlp, over weights in tiles (`layout`).

Arguments: x, records, an empty array [E, F, 0] that says how many experts there are and how wide, expert_ids,
expert_weights, activation code, int32 offsets of a record's parts, its bytes and its group. Results: those of expert_mlp.
Where weights are integers, digits (`_cpu.digit_code`) stand where the sorted rows of x and, in the place of up's output, the
activations would be.
"""

import numpy as np
from numba import types
from numba.extending import overload

from pallas_kernels._cpu.code import LANES
from pallas_kernels._cpu.digit_code import DIGITS, INTEGER_ROWS, LARGEST, store_digits
from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result, result_dimension
from pallas_kernels._cpu.memory import jit, load_i32, load_i64, store_f32, store_i64
from pallas_kernels._cpu.threads import (
    ENDS,
    REFERENCES,
    atomic_add,
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
from pallas_kernels._cpu.tiles import BFLOAT16, FLOAT32, INT4, INT8, integer_tile, stream_tile, stream_width
from pallas_kernels._cpu.vector import vload, vmax, vmuladd, vreduce_add, vreduce_max, vsplat, vsub
from pallas_kernels.expert_mlp._native import (
    DEPTH_BLOCK,
    FRAME,
    PANEL,
    ROWS_PER_ITEM,
    SILU,
    SORTED,
    activate,
    ceil_div,
    combine,
    gather_rows,
    order_parts,
    sort_by_expert,
)
from pallas_kernels.packed_experts.layout import SCALES, SMALL_TILE, TILE

# Parts of a record, by the place of their offset. Rows of a group are multiplied at a time: integers have one scale for them.
GATE, UP, DOWN, RECORD_BYTES, GROUP_ROWS = range(5)
_LEAST = np.float32(1e-30)  # of a group's largest activation, so that its inverse is finite


def float32_handler(frame):
    """One call with float32 weights."""
    if not answers_metadata(frame):
        _call(frame, _float32_task(), FLOAT32)
    return 0


def bfloat16_handler(frame):
    """One call with bfloat16 weights."""
    if not answers_metadata(frame):
        _call(frame, _bfloat16_task(), BFLOAT16)
    return 0


def int8_handler(frame):
    """One call with weights of bytes."""
    if not answers_metadata(frame):
        _call(frame, _int8_task(), INT8)
    return 0


def int4_handler(frame):
    """One call with weights of nibbles."""
    if not answers_metadata(frame):
        _call(frame, _int4_task(), INT4)
    return 0


def prepare(frame):
    """For callers that bring their own threads: a block, to be passed to one `run_` and to each `help_` that was announced."""
    return _new_call(frame)


def announce(block):
    """One more thread will call `help_`."""
    atomic_add(block + REFERENCES, 1)
    return 0


def run_float32(block):
    """Does what nobody else does of the call, and returns when all is done."""
    _work(block, FLOAT32)
    finish(block)
    return 0


def run_bfloat16(block):
    _work(block, BFLOAT16)
    finish(block)
    return 0


def run_int8(block):
    _work(block, INT8)
    finish(block)
    return 0


def run_int4(block):
    _work(block, INT4)
    finish(block)
    return 0


def help_float32(block):
    """Takes part in a call; may come late, or after its end."""
    _float32_worker(block)
    return 0


def help_bfloat16(block):
    _bfloat16_worker(block)
    return 0


def help_int8(block):
    _int8_worker(block)
    return 0


def help_int4(block):
    _int4_worker(block)
    return 0


@jit
def _call(frame, task, tag):
    block = _new_call(frame)
    workers = min(pool_threads(frame), result_dimension(frame, 5, 0))
    items = load_i64(block + ENDS + 8) - load_i64(block + ENDS)
    invite(frame, block, task, min(workers, items) - 1)
    _work(block, tag)
    finish(block)


@jit
def _new_call(frame):
    block = new_block(3)
    touched, rows = sort_by_expert(frame)
    store_i64(block + FRAME, frame)
    store_i64(block + SORTED, rows)
    gate_up = touched * ceil_div(dimension(frame, 2, 1), PANEL)
    down = touched * ceil_div(dimension(frame, 0, 1), PANEL)
    tokens = ceil_div(dimension(frame, 3, 0), ROWS_PER_ITEM)
    set_phases(block, ceil_div(rows, ROWS_PER_ITEM), gate_up, down, tokens)
    return block


@jit
def _work(block, tag):
    item = take_item(block, -1)
    if item < 0:
        return
    frame = load_i64(block + FRAME)
    pack = result(frame, 5) + 4 * result_dimension(frame, 5, 1) * worker_number(block)
    while item >= 0:
        end_1, end_2 = load_i64(block + ENDS), load_i64(block + ENDS + 8)
        end_3 = load_i64(block + ENDS + 16)
        if item < end_1:
            _gather(tag, frame, item, load_i64(block + SORTED))
        elif item < end_2:
            _gate_up_item(tag, frame, item - end_1, pack)
        elif item < end_3:
            _down_item(tag, frame, item - end_2, pack)
        else:
            combine(frame, item - end_3)
        item = take_item(block, item)


@jit
def _rows_of(frame, which):
    """Record, first row and number of rows of a touched expert."""
    _, _, starts, experts = order_parts(frame)
    first = load_i32(starts + 4 * which)
    record = argument(frame, 1) + load_i32(experts + 4 * which) * _part(frame, RECORD_BYTES)
    return record, first, load_i32(starts + 4 * which + 4) - first


@jit
def _part(frame, part):
    return load_i32(argument(frame, 6) + 4 * part)


@jit
def _gather(tag, frame, item, rows):
    if not _integers(tag):
        gather_rows(frame, item, rows)
        return
    model_dim, top_k, group = dimension(frame, 0, 1), dimension(frame, 3, 1), _part(frame, GROUP_ROWS)
    order, stride = order_parts(frame)[0], 4 * result_dimension(frame, 2, 1)
    for row in range(item * ROWS_PER_ITEM, min(rows, (item + 1) * ROWS_PER_ITEM)):
        token = load_i32(order + 4 * row) // top_k
        _digits(
            tag, result(frame, 2) + row * stride, argument(frame, 0) + 4 * model_dim * token, model_dim, group
        )


@jit
def _gate_up_item(tag, frame, item, pack):
    model_dim, hidden_dim = dimension(frame, 0, 1), dimension(frame, 2, 1)
    panels = ceil_div(hidden_dim, PANEL)
    panel = item % panels
    record, first, rows = _rows_of(frame, item // panels)
    lda, ldc = 4 * result_dimension(frame, 2, 1), 4 * result_dimension(frame, 3, 1)
    a, c = result(frame, 2) + first * lda, result(frame, 3) + first * ldc
    column, end, group = panel * PANEL, min(hidden_dim, (panel + 1) * PANEL), _part(frame, GROUP_ROWS)
    gate, up, c_up = record + _part(frame, GATE), record + _part(frame, UP), c + 4 * hidden_dim
    begin_up, after = up + _before(tag, column, model_dim, group), gate + _before(tag, end, model_dim, group)
    _multiply(tag, c, ldc, a, lda, gate, rows, column, end, hidden_dim, model_dim, group, pack, begin_up)
    _multiply(tag, c_up, ldc, a, lda, up, rows, column, end, hidden_dim, model_dim, group, pack, after)
    silu = load_i32(argument(frame, 5)) == SILU
    for row in range(rows):
        at, at_up = c + row * ldc + 4 * column, c_up + row * ldc + 4 * column
        activate(at, at_up, end - column, silu)
        if _integers(tag):
            _digits(tag, at_up, at, end - column, group)


@jit
def _down_item(tag, frame, item, pack):
    model_dim, hidden_dim = dimension(frame, 0, 1), dimension(frame, 2, 1)
    panels = ceil_div(model_dim, PANEL)
    panel = item % panels
    record, first, rows = _rows_of(frame, item // panels)
    lda, ldc = 4 * result_dimension(frame, 3, 1), 4 * result_dimension(frame, 4, 1)
    a, c = result(frame, 3) + first * lda, result(frame, 4) + first * ldc
    if _integers(tag):
        a += 4 * hidden_dim
    column, end, group = panel * PANEL, min(model_dim, (panel + 1) * PANEL), _part(frame, GROUP_ROWS)
    down = record + _part(frame, DOWN)
    after = down + _before(tag, end, hidden_dim, group)
    _multiply(tag, c, ldc, a, lda, down, rows, column, end, model_dim, hidden_dim, group, pack, after)


def _integers(tag):
    """Whether the weights are integers."""
    raise NotImplementedError("only numba code calls this")


@overload(_integers)
def _integers_of(tag):
    answer = tag in (types.int8, types.int16)
    return lambda tag: answer


def _size(tag):
    """Bytes of a floating weight, bits of an integer."""
    raise NotImplementedError("only numba code calls this")


@overload(_size)
def _size_of(tag):
    size = {types.float32: 4, types.uint16: 2, types.int8: 8, types.int16: 4}[tag]
    return lambda tag: size


@jit
def _before(tag, column, depth, group):
    """Bytes of all columns before this one, the first of a tile."""
    if _integers(tag):
        return column // SMALL_TILE * (depth * SMALL_TILE * _size(tag) // 8 + ceil_div(depth, group) * SCALES)
    return column * depth * _size(tag)


@jit
def _digits(tag, to, source, depth, group):
    """`depth` float32 at `source` as digits and scales, group by group."""
    zero, offset = vsplat(np.float32(0)), 1 << (_size(tag) - 1)
    for k in range(0, depth, group):
        n = min(group, depth - k)
        largest, sound = vsplat(_LEAST), zero
        for i in range(4 * k, 4 * (k + n), 4 * LANES):
            x = vload(source + i)
            largest = vmax(largest, vmax(x, vsub(zero, x)))
            sound = vmuladd(x, zero, sound)  # not a number where one of them is none, or infinite
        scale = vreduce_max(largest) / np.float32(LARGEST)
        store_digits(to + 4 * k, source + 4 * k, n, np.float32(1) / scale, offset)
        store_f32(to + 4 * k + 4 * DIGITS, scale + vreduce_add(sound))


@jit
def _multiply(tag, c, ldc, a, lda, b, rows, column, end, columns, depth, group, pack, after):
    """C[:, column:end] = A @ B[:, column:end] of a B with so many `columns`; `after` is the address that is read next."""
    if _integers(tag):
        _multiply_integers(tag, c, ldc, a, lda, b, rows, column, end, depth, group)
    else:
        _multiply_floats(tag, c, ldc, a, lda, b, rows, column, end, columns, depth, pack, after)


@jit
def _multiply_integers(tag, c, ldc, a, lda, b, rows, column, end, depth, group):
    """Rows a few at a time, so that the weights come from memory once and the activations stay near."""
    chunks = ceil_div(rows, INTEGER_ROWS)
    first = 0
    for chunk in range(chunks):
        n = ceil_div(rows - first, chunks - chunk)
        for at in range(column, end, SMALL_TILE):
            begin, to = b + _before(tag, at, depth, group), c + first * ldc + 4 * at
            integer_tile(tag, to, ldc, a + first * lda, lda, begin, n, depth, group)
        first += n


@jit
def _multiply_floats(tag, c, ldc, a, lda, b, rows, column, end, columns, depth, pack, after):
    size = _size(tag)
    while column < end:
        tile = TILE if column + TILE <= columns // TILE * TILE else SMALL_TILE
        begin, line = b + column * depth * size, tile * size
        within = 0
        while within < tile:
            width = stream_width(tile - within)
            last = begin + size * (within + width) if within + width < tile else after
            if within + width == tile and column + tile < end:
                last = begin + tile * depth * size
            for k in range(0, depth, DEPTH_BLOCK):
                n = min(DEPTH_BLOCK, depth - k)
                here = begin + k * line + size * within
                following = here + n * line if k + n < depth else last
                c_at, a_at = c + 4 * (column + within), a + 4 * k
                stream_tile(tag, size, c_at, ldc, a_at, lda, here, line, rows, width, n, k, following, pack)
            within += width
        column += tile


@jit
def _float32_worker(block):
    _work(block, FLOAT32)
    release(block)


@jit
def _bfloat16_worker(block):
    _work(block, BFLOAT16)
    release(block)


@jit
def _int8_worker(block):
    _work(block, INT8)
    release(block)


@jit
def _int4_worker(block):
    _work(block, INT4)
    release(block)


_float32_task = task_address(_float32_worker)
_bfloat16_task = task_address(_bfloat16_worker)
_int8_task = task_address(_int8_worker)
_int4_task = task_address(_int4_worker)
