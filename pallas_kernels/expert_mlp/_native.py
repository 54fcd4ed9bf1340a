"""The numba side of expert_mlp.

Four phases: gather the rows of x by expert; per (expert, panel of hidden columns) gate, up and activation; per
(expert, panel of output columns) down; per block of tokens the weighted sum over its experts.

Arguments: x, gate_up, down, expert_ids, expert_weights, activation code.
Results: out; order (int32: per sorted row its pair, per pair its sorted row or -1, first row of each touched expert
and the end, touched experts); the sorted rows of x, of gate_up's output, of down's output; packed weights per worker.
"""

from pallas_kernels._cpu.code import LANES
from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result, result_dimension
from pallas_kernels._cpu.memory import (
    copy_bytes,
    jit,
    load_f32,
    load_i32,
    load_i64,
    store_i32,
    store_i64,
    zero_bytes,
)
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
from pallas_kernels._cpu.tiles import BFLOAT16, FLOAT32, stream_tile, stream_width
from pallas_kernels._cpu.vector import vload, vmul, vmuladd, vsigmoid, vsplat, vstore

# Rows of weights multiplied at a time: with 64 columns, two thirds of a first-level cache of 48 KiB.
DEPTH_BLOCK = 128
# Columns of one item: runs long enough for memory, items enough for balance.
PANEL = 128
ROWS_PER_ITEM = 64
# Words of the job.
FRAME, TOUCHED, SORTED = JOB, JOB + 8, JOB + 16
SILU = 0


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
    tokens = dimension(frame, 3, 0)
    block = new_block(3)
    store_i64(block + FRAME, frame)
    touched, rows = sort_by_expert(frame)
    store_i64(block + TOUCHED, touched)
    store_i64(block + SORTED, rows)
    gather = ceil_div(rows, ROWS_PER_ITEM)
    gate_up = touched * ceil_div(dimension(frame, 2, 1), PANEL)
    down = touched * ceil_div(dimension(frame, 0, 1), PANEL)
    set_phases(block, gather, gate_up, down, ceil_div(tokens, ROWS_PER_ITEM))
    workers = min(pool_threads(frame), result_dimension(frame, 5, 0))
    invite(frame, block, task, min(workers, gate_up) - 1)
    _work(block, tag, size)
    finish(block)


@jit
def ceil_div(a, b):
    return (a + b - 1) // b


@jit
def order_parts(frame):
    """Addresses of the four parts of result 1."""
    pairs, experts = dimension(frame, 3, 0) * dimension(frame, 3, 1), dimension(frame, 2, 0)
    order = result(frame, 1)
    return order, order + 4 * pairs, order + 8 * pairs, order + 8 * pairs + 4 * (experts + 1)


@jit
def sort_by_expert(frame):
    """Counting sort, stable; returns how many experts are touched and how many pairs are real."""
    ids, experts = argument(frame, 3), dimension(frame, 2, 0)
    pairs = dimension(frame, 3, 0) * dimension(frame, 3, 1)
    order, position, starts, touched = order_parts(frame)
    # `starts` first holds counts by expert, then the next free row by expert, at last the starts of touched ones.
    zero_bytes(starts, 4 * (experts + 1))
    for pair in range(pairs):
        expert = load_i32(ids + 4 * pair)
        if expert >= 0 and expert < experts:
            store_i32(starts + 4 * expert, load_i32(starts + 4 * expert) + 1)
    row = 0
    for expert in range(experts):
        count = load_i32(starts + 4 * expert)
        store_i32(starts + 4 * expert, row)
        row += count
    for pair in range(pairs):
        expert = load_i32(ids + 4 * pair)
        at = -1
        if expert >= 0 and expert < experts:
            at = load_i32(starts + 4 * expert)
            store_i32(starts + 4 * expert, at + 1)
            store_i32(order + 4 * at, pair)
        store_i32(position + 4 * pair, at)
    # Now starts[e] is where e ends.
    count = 0
    begin = 0
    for expert in range(experts):
        end = load_i32(starts + 4 * expert)
        if end > begin:
            store_i32(starts + 4 * count, begin)
            store_i32(touched + 4 * count, expert)
            count += 1
        begin = end
    store_i32(starts + 4 * count, row)
    return count, row


@jit
def _work(block, tag, size):
    item = take_item(block, -1)
    if item < 0:
        return
    frame = load_i64(block + FRAME)
    touched = load_i64(block + TOUCHED)
    pack = result(frame, 5) + 4 * result_dimension(frame, 5, 1) * worker_number(block)
    while item >= 0:
        end_1, end_2 = load_i64(block + ENDS), load_i64(block + ENDS + 8)
        end_3 = load_i64(block + ENDS + 16)
        if item < end_1:
            gather_rows(frame, item, load_i64(block + SORTED))
        elif item < end_2:
            _gate_up_item(tag, size, frame, item - end_1, touched, pack)
        elif item < end_3:
            _down_item(tag, size, frame, item - end_2, touched, pack)
        else:
            combine(frame, item - end_3)
        item = take_item(block, item)


@jit
def gather_rows(frame, item, rows):
    model_dim, top_k = dimension(frame, 0, 1), dimension(frame, 3, 1)
    order, stride = order_parts(frame)[0], 4 * result_dimension(frame, 2, 1)
    x, gathered = argument(frame, 0), result(frame, 2)
    for row in range(item * ROWS_PER_ITEM, min(rows, (item + 1) * ROWS_PER_ITEM)):
        token = load_i32(order + 4 * row) // top_k
        copy_bytes(gathered + row * stride, x + 4 * model_dim * token, 4 * model_dim)


@jit
def _gate_up_item(tag, size, frame, item, touched, pack):
    model_dim, hidden_dim = dimension(frame, 0, 1), dimension(frame, 2, 1)
    _, _, starts, experts = order_parts(frame)
    # Panels of one expert follow each other, so that threads read neighbouring columns at the same time.
    panels = ceil_div(hidden_dim, PANEL)
    which, panel = item // panels, item % panels
    first = load_i32(starts + 4 * which)
    rows = load_i32(starts + 4 * which + 4) - first
    ldb = 2 * hidden_dim * size
    weights = argument(frame, 1) + load_i32(experts + 4 * which) * model_dim * ldb
    lda, ldc = 4 * result_dimension(frame, 2, 1), 4 * result_dimension(frame, 3, 1)
    a, c = result(frame, 2) + first * lda, result(frame, 3) + first * ldc
    column, end = panel * PANEL, min(hidden_dim, (panel + 1) * PANEL)
    up, up_end = hidden_dim + column, hidden_dim + end
    _multiply(tag, size, c, ldc, a, lda, weights, ldb, rows, column, end, model_dim, pack, up)
    _multiply(tag, size, c, ldc, a, lda, weights, ldb, rows, up, up_end, model_dim, pack, end)
    silu = load_i32(argument(frame, 5)) == SILU
    for row in range(rows):
        activate(c + row * ldc + 4 * column, c + row * ldc + 4 * up, end - column, silu)


@jit
def _down_item(tag, size, frame, item, touched, pack):
    model_dim, hidden_dim = dimension(frame, 0, 1), dimension(frame, 2, 1)
    _, _, starts, experts = order_parts(frame)
    panels = ceil_div(model_dim, PANEL)
    which, panel = item // panels, item % panels
    first = load_i32(starts + 4 * which)
    rows = load_i32(starts + 4 * which + 4) - first
    ldb = model_dim * size
    weights = argument(frame, 2) + load_i32(experts + 4 * which) * hidden_dim * ldb
    lda, ldc = 4 * result_dimension(frame, 3, 1), 4 * result_dimension(frame, 4, 1)
    a, c = result(frame, 3) + first * lda, result(frame, 4) + first * ldc
    end = min(model_dim, (panel + 1) * PANEL)
    _multiply(tag, size, c, ldc, a, lda, weights, ldb, rows, panel * PANEL, end, hidden_dim, pack, end)


@jit
def _multiply(tag, size, c, ldc, a, lda, b, ldb, rows, column, end, depth, pack, then):
    """C[:, column:end] = A @ B[:, column:end]; `then` is the column that is read afterwards."""
    while column < end:
        width = stream_width(end - column)
        next_column = column + width if column + width < end else then
        for k in range(0, depth, DEPTH_BLOCK):
            n = min(DEPTH_BLOCK, depth - k)
            here = b + k * ldb + size * column
            following = here + n * ldb if k + n < depth else b + size * next_column
            c_at, a_at = c + 4 * column, a + 4 * k
            stream_tile(tag, size, c_at, ldc, a_at, lda, here, ldb, rows, width, n, k, following, pack)
        column += width


@jit
def activate(gate, up, columns, silu):
    """gate = act(gate) * up, in place."""
    for column in range(0, columns, LANES):
        g, u = vload(gate + 4 * column), vload(up + 4 * column)
        if silu:
            s = vsigmoid(g)
        else:
            # gelu_tanh(g) = g * sigmoid(2 * sqrt(2 / pi) * (g + 0.044715 g^3))
            cubic = vmuladd(vmul(vmul(g, g), vsplat(0.044715)), g, g)
            s = vsigmoid(vmul(cubic, vsplat(1.5957691216057308)))
        vstore(gate + 4 * column, vmul(vmul(g, s), u))


@jit
def combine(frame, item):
    tokens, top_k, model_dim = dimension(frame, 3, 0), dimension(frame, 3, 1), dimension(frame, 0, 1)
    position, stride = order_parts(frame)[1], 4 * result_dimension(frame, 4, 1)
    weights, out, pairs = argument(frame, 4), result(frame, 0), result(frame, 4)
    for token in range(item * ROWS_PER_ITEM, min(tokens, (item + 1) * ROWS_PER_ITEM)):
        row = out + 4 * model_dim * token
        zero_bytes(row, 4 * model_dim)
        for k in range(top_k):
            at = load_i32(position + 4 * (token * top_k + k))
            if at >= 0:
                add_scaled(row, pairs + at * stride, load_f32(weights + 4 * (token * top_k + k)), model_dim)


@jit
def add_scaled(to, source, factor, count):
    for i in range(0, count, LANES):
        vstore(to + 4 * i, vmuladd(vsplat(factor), vload(source + 4 * i), vload(to + 4 * i)))


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
