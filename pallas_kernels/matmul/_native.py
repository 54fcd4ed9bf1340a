"""The numba side of matmul.

An item is a panel of columns. Arguments: x, whose rows may be longer than K, and w. Results: out; packed
weights per worker.
"""

from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result, result_dimension
from pallas_kernels._cpu.memory import jit, load_i64, store_i64
from pallas_kernels._cpu.threads import (
    DONE,
    ENDS,
    JOB,
    NEXT,
    atomic_add,
    finish,
    invite,
    new_block,
    pool_threads,
    release,
    set_phases,
    task_address,
    worker_number,
)
from pallas_kernels._cpu.tiles import BFLOAT16, FLOAT32, stream_tile, stream_width

# Rows of weights multiplied at a time, along all columns of the panel, so that memory is read in long runs.
DEPTH_BLOCK = 128
# Columns of one item, where that leaves enough items for balance.
PANEL, SMALLEST_PANEL = 256, 64
ITEMS_PER_THREAD = 3
# Word of the job after the frame.
WIDTH = JOB + 8


def float32_handler(frame):
    """One call with float32 weights."""
    if not answers_metadata(frame):
        _call(frame, _float32_task(), FLOAT32, 4)
    return 0


def bfloat16_handler(frame):
    """One call with bfloat16 weights."""
    if not answers_metadata(frame):
        _call(frame, _bfloat16_task(), BFLOAT16, 2)
    return 0


@jit
def _call(frame, task, tag, size):
    columns, workers = dimension(frame, 1, 1), max(1, min(pool_threads(frame), result_dimension(frame, 1, 0)))
    width = PANEL
    while width > SMALLEST_PANEL and columns < width * ITEMS_PER_THREAD * workers:
        width //= 2
    panels = (columns + width - 1) // width
    block = new_block(2)
    store_i64(block + JOB, frame)
    store_i64(block + WIDTH, width)
    set_phases(block, panels, 0, 0, 0)
    invite(frame, block, task, min(workers, panels) - 1)
    _work(block, tag, size)
    finish(block)


@jit
def _work(block, tag, size):
    """Takes an item before the one at hand is done, so that its first weights can be asked for."""
    frame, width, panels = load_i64(block + JOB), load_i64(block + WIDTH), load_i64(block + ENDS)
    item = atomic_add(block + NEXT, 1)
    if item >= panels:
        return
    pack = result(frame, 1) + 4 * result_dimension(frame, 1, 1) * worker_number(block)
    while item < panels:
        following = atomic_add(block + NEXT, 1)
        then = following if following < panels else item
        _panel(tag, size, frame, item * width, width, then * width, pack)
        atomic_add(block + DONE, 1)
        item = following


@jit
def _panel(tag, size, frame, first, width, then, pack):
    """out[:, first : first + width]; `then` is the column that is read afterwards."""
    rows, depth, columns = dimension(frame, 0, 0), dimension(frame, 1, 0), dimension(frame, 1, 1)
    x, w, out = argument(frame, 0), argument(frame, 1), result(frame, 0)
    lda, ldb, ldc = 4 * dimension(frame, 0, 1), size * columns, 4 * columns
    end = min(columns, first + width)
    for k in range(0, depth, DEPTH_BLOCK):
        n = min(DEPTH_BLOCK, depth - k)
        after = w + (k + n) * ldb + size * first if k + n < depth else w + size * then
        column = first
        while column < end:
            n_columns = stream_width(end - column)
            here = w + k * ldb + size * column
            ahead = here + size * n_columns if column + n_columns < end else after
            stream_tile(
                tag, size, out + 4 * column, ldc, x + 4 * k, lda, here, ldb, rows, n_columns, n, k, ahead, pack
            )  # fmt: skip
            column += n_columns


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
