"""The numba side of int4_matmul.

Two phases: per block of rows, what their sums begin with; per (matrix, panel of outputs) the products. Arguments: x low (int8, or float32 without a scale),
x low scale, x high, x high scale, low, scale, channel, high, high scale, group sizes. Matrices have an axis E in front.
Results: out [M, N]; start (int32 [M, lanes]); order (int32: first row of each matrix that has rows and the end, those
matrices); words of each worker's tile.
"""

from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result, result_dimension
from pallas_kernels._cpu.memory import jit, load_i32, load_i64, store_i32, store_i64, zero_bytes
from pallas_kernels._cpu.threads import (
    ENDS,
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
from pallas_kernels.int4_matmul._float_tiles import run_float
from pallas_kernels.int4_matmul._tiles import run_high, run_low, start_16, start_32, start_64, tile_key

PANEL = 64  # outputs of an item
ROWS_PER_ITEM = 32
FRAME, PANELS = JOB, JOB + 8
X_LOW, X_LOW_SCALE, X_HIGH, X_HIGH_SCALE, LOW, SCALE, CHANNEL, HIGH, HIGH_SCALE, SIZES = range(10)
OUT, START, ORDER, WORDS = range(4)


def handler(frame):
    """One call."""
    if not answers_metadata(frame):
        _call(frame, _task())
    return 0


@jit
def _call(frame, task):
    outputs = result_dimension(frame, OUT, 1)
    panels = (outputs + PANEL - 1) // PANEL
    block = new_block(2)
    store_i64(block + FRAME, frame)
    store_i64(block + PANELS, panels)
    items = _find_matrices(frame) * panels
    rows = result_dimension(frame, OUT, 0)
    set_phases(block, (rows + ROWS_PER_ITEM - 1) // ROWS_PER_ITEM, items, 0, 0)
    workers = max(1, min(pool_threads(frame), result_dimension(frame, WORDS, 0)))
    invite(frame, block, task, min(workers, items) - 1)
    _work(block)
    finish(block)


@jit
def _find_matrices(frame):
    """Notes the matrices that have rows, and the first row of each; returns how many."""
    count, row, experts = 0, 0, dimension(frame, SIZES, 0)
    starts = result(frame, ORDER)
    touched = starts + 4 * (experts + 1)
    for e in range(experts):
        size = load_i32(argument(frame, SIZES) + 4 * e)
        if size > 0:
            store_i32(starts + 4 * count, row)
            store_i32(touched + 4 * count, e)
            count += 1
            row += size
    store_i32(starts + 4 * count, row)
    return count


@jit
def _work(block):
    item = take_item(block, -1)
    if item < 0:
        return
    frame, panels = load_i64(block + FRAME), load_i64(block + PANELS)
    words = result(frame, WORDS) + 4 * result_dimension(frame, WORDS, 1) * worker_number(block)
    while item >= 0:
        before = load_i64(block + ENDS)
        if item < before:
            _begin_rows(frame, item)
        else:
            _panel(frame, (item - before) // panels, (item - before) % panels, words)
        item = take_item(block, item)


@jit
def _low_size(frame):
    """Bytes of weights in one vector: half a packing block."""
    group = 2 * dimension(frame, LOW, 2) // dimension(frame, SCALE, 2)
    return min(64, (group & -group) // 2)


@jit
def _high_size(frame):
    channels = dimension(frame, HIGH, 2)
    return min(64, channels & -channels)


@jit
def _begin_rows(frame, item):
    rows, low, high = result_dimension(frame, OUT, 0), dimension(frame, X_LOW, 1), dimension(frame, X_HIGH, 1)
    starts, experts = result(frame, ORDER), dimension(frame, SIZES, 0)
    end, count = 0, 0
    while count <= experts and (count == 0 or load_i32(starts + 4 * count) > end):
        end = load_i32(starts + 4 * count)
        count += 1
    for row in range(item * ROWS_PER_ITEM, min(rows, (item + 1) * ROWS_PER_ITEM)):
        to = result(frame, START) + 4 * result_dimension(frame, START, 1) * row
        if low > 0 and dimension(frame, X_LOW_SCALE, 1) > 0:
            size = max(_low_size(frame), 16)
            groups = dimension(frame, SCALE, 2)
            x = argument(frame, X_LOW) + low * row
            for g in range(groups):
                _start(size, to, x + g * (low // groups), low // groups // size, 8)
                to += size
        elif low == 0:
            zero_bytes(
                result(frame, OUT) + 4 * result_dimension(frame, OUT, 1) * row,
                4 * result_dimension(frame, OUT, 1),
            )
        if high > 0:
            size = _high_size(frame)
            _start(size, to, argument(frame, X_HIGH) + high * row, high // size, 128)


@jit
def _start(size, to, x, vectors, offset):
    if size == 64:
        start_64(to, x, vectors, offset)
    elif size == 32:
        start_32(to, x, vectors, offset)
    else:
        start_16(to, x, vectors, offset)


@jit
def _panel(frame, which, panel, words):
    experts = dimension(frame, SIZES, 0)
    starts = result(frame, ORDER)
    matrix = load_i32(starts + 4 * (experts + 1 + which))
    row, end = load_i32(starts + 4 * which), load_i32(starts + 4 * which + 4)
    while row < end:
        left = end - row
        rows = 8 if left >= 8 else 4 if left >= 4 else 1
        if dimension(frame, X_LOW, 1) > 0 and dimension(frame, X_LOW_SCALE, 1) == 0:
            _float_panel(frame, matrix, panel, row, rows, words)
        elif dimension(frame, X_LOW, 1) > 0:
            _low_panel(frame, matrix, panel, row, rows, words)
        if dimension(frame, X_HIGH, 1) > 0:
            _high_panel(frame, matrix, panel, row, rows, words)
        row += rows


@jit
def _low_panel(frame, matrix, panel, row, rows, words):
    outputs, channels = result_dimension(frame, OUT, 1), dimension(frame, X_LOW, 1)
    first = panel * PANEL
    groups, scale_rows = dimension(frame, SCALE, 2), dimension(frame, SCALE, 1)
    two_level = 1 if dimension(frame, CHANNEL, 1) > 0 else 0
    size, shift = _low_size(frame), 1 if scale_rows < outputs else 0
    scale_row = groups * (1 if two_level else 4)
    x_scales = dimension(frame, X_LOW_SCALE, 1)
    _out(frame, row, first, words)
    store_i64(words + 16, argument(frame, X_LOW) + channels * row)
    store_i64(words + 24, channels)
    store_i64(words + 32, result(frame, START) + 4 * result_dimension(frame, START, 1) * row)
    store_i64(words + 40, 4 * result_dimension(frame, START, 1))
    store_i64(words + 48, argument(frame, X_LOW_SCALE) + 4 * x_scales * row)
    store_i64(words + 56, 4 * x_scales)
    store_i64(words + 64, 4 if x_scales > 1 else 0)
    store_i64(words + 72, argument(frame, LOW) + (matrix * outputs + first) * (channels // 2))
    store_i64(words + 80, channels // 2)
    store_i64(words + 88, argument(frame, SCALE) + (matrix * scale_rows + (first >> shift)) * scale_row)
    store_i64(words + 96, scale_row)
    store_i64(words + 104, shift)
    store_i64(words + 112, argument(frame, CHANNEL) + 4 * (matrix * outputs + first))
    store_i64(words + 120, groups)
    store_i64(words + 128, channels // groups // (2 * size))
    store_i64(words + 136, min(PANEL, outputs - first))
    run_low(tile_key(rows, size, two_level), words)


@jit
def _float_panel(frame, matrix, panel, row, rows, words):
    """Activations without scales are float32."""
    outputs, channels = result_dimension(frame, OUT, 1), dimension(frame, X_LOW, 1)
    first, groups, scale_rows = panel * PANEL, dimension(frame, SCALE, 2), dimension(frame, SCALE, 1)
    half, shift = _low_size(frame), 1 if scale_rows < outputs else 0
    _out(frame, row, first, words)
    store_i64(words + 16, argument(frame, X_LOW) + 4 * channels * row)
    store_i64(words + 24, 4 * channels)
    store_i64(words + 32, argument(frame, LOW) + (matrix * outputs + first) * (channels // 2))
    store_i64(words + 40, channels // 2)
    store_i64(words + 48, argument(frame, SCALE) + 4 * groups * (matrix * scale_rows + (first >> shift)))
    store_i64(words + 56, 4 * groups)
    store_i64(words + 64, shift)
    store_i64(words + 72, groups)
    store_i64(words + 80, channels // groups // (2 * half))
    store_i64(words + 88, min(PANEL, outputs - first))
    run_float(tile_key(rows, half, 0), words)


@jit
def _high_panel(frame, matrix, panel, row, rows, words):
    outputs, channels = result_dimension(frame, OUT, 1), dimension(frame, X_HIGH, 1)
    first, size, start_row = panel * PANEL, _high_size(frame), 4 * result_dimension(frame, START, 1)
    _out(frame, row, first, words)
    store_i64(words + 16, argument(frame, X_HIGH) + channels * row)
    store_i64(words + 24, channels)
    # What the sums of the high part begin with is the last of a row.
    store_i64(words + 32, result(frame, START) + start_row * (row + 1) - size)
    store_i64(words + 40, start_row)
    store_i64(words + 48, argument(frame, X_HIGH_SCALE) + 4 * row)
    store_i64(words + 56, 4)
    store_i64(words + 64, argument(frame, HIGH) + (matrix * outputs + first) * channels)
    store_i64(words + 72, channels)
    store_i64(words + 80, argument(frame, HIGH_SCALE) + 4 * (matrix * outputs + first))
    store_i64(words + 88, channels // size)
    store_i64(words + 96, min(PANEL, outputs - first))
    run_high(tile_key(rows, size, 0), words)


@jit
def _out(frame, row, first, words):
    outputs = result_dimension(frame, OUT, 1)
    store_i64(words, result(frame, OUT) + 4 * (outputs * row + first))
    store_i64(words + 8, 4 * outputs)


@jit
def _worker(block):
    _work(block)
    release(block)


_task = task_address(_worker)
