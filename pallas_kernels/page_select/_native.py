"""The numba side of page_select. An item is a row and a choosing head.

Arguments: scores [S, H, G, P], pages, keep, (first, last), (scale, top_p). Results: positions [S, H, W], number [S, H], and
scratch per worker: P keys, the histogram, P candidates.
"""

import math

import numpy as np

from pallas_kernels._cpu.code import LANES
from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result, result_dimension
from pallas_kernels._cpu.memory import (
    float_of_bits,
    jit,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i32,
    store_i64,
    zero_bytes,
)
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
from pallas_kernels._cpu.vector import (
    vadd,
    vexp,
    vload,
    vmax,
    vmul,
    vreduce_add,
    vreduce_max,
    vsplat,
    vstore,
    vsub,
)

# A key has 32 bits; these many are settled at a time, from the top.
DIGIT, BINS = 8, 256
LOWEST = -1e30
ONE = np.float32(1)


def handler(frame):
    """One call."""
    if not answers_metadata(frame):
        _call(frame, _task())
    return 0


@jit
def _call(frame, task):
    items = dimension(frame, 0, 0) * dimension(frame, 0, 1)
    block = new_block(1)
    store_i64(block + JOB, frame)
    set_phases(block, items, 0, 0, 0)
    invite(frame, block, task, min(pool_threads(frame), result_dimension(frame, 2, 0), items) - 1)
    _work(block)
    finish(block)


@jit
def _work(block):
    item = take_item(block, -1)
    if item < 0:
        return
    frame = load_i64(block + JOB)
    scratch = result(frame, 2) + 4 * result_dimension(frame, 2, 1) * worker_number(block)
    while item >= 0:
        _choose(frame, item, item // dimension(frame, 0, 1), scratch)
        item = take_item(block, item)


@jit
def _choose(frame, item, row, keys):
    total, width = dimension(frame, 0, 3), result_dimension(frame, 0, 2)
    own = min(max(load_i32(argument(frame, 1) + 4 * row), 0), total)
    number = max(min(min(load_i32(argument(frame, 2) + 4 * row), own), width), 0)
    to = result(frame, 0) + 4 * width * item
    zero_bytes(to, 4 * width)
    low, high, wanted = own, own, 0
    scale, top_p = load_f32(argument(frame, 4)), load_f32(argument(frame, 4) + 4)
    adapts = number < own and top_p < 1
    share = logsumexp = ONE
    if number < own:
        low = min(load_i32(argument(frame, 3)), own)
        high = max(own - load_i32(argument(frame, 3) + 4), low)
        wanted = number - (own - (high - low))
        group = dimension(frame, 0, 2)
        _rank(argument(frame, 0) + 4 * total * group * item, group, total, own, scale, keys)
        if adapts:
            share = scale if group == 1 else ONE
            logsumexp = _logsumexp(keys, own, share)
        _order_bits(keys, low, high)
    bins = keys + 4 * total
    threshold, ties = _threshold(keys, low, high, wanted, bins, bins + 4 * BINS)
    for page in range(min(low, number)):
        store_i32(to + 4 * page, page)
    middle = number - low - (own - high)
    _emit(keys, low, high, threshold, ties, to + 4 * low, middle)
    if adapts and middle > 0:
        held = _held(keys, 0, low, share, logsumexp) + _held(keys, high, own, share, logsumexp)
        kept = _enough(keys, to + 4 * low, middle, share, logsumexp, top_p - held, bins + 4 * BINS)
        number -= middle - kept
    store_i32(result(frame, 1) + 4 * item, number)
    for page in range(max(high, own - number), own):
        store_i32(to + 4 * (page - own + number), page)


@jit
def _emit(keys, low, high, threshold, ties, to, wanted):
    """Without a branch on what is chosen, which nothing could predict."""
    done = 0
    for page in range(low, high):
        if done >= wanted:
            break
        key = load_i32(keys + 4 * page)
        store_i32(to + 4 * done, page)
        done += (key > threshold) | ((key == threshold) & (ties > 0))
        ties -= key == threshold


@jit
def _held(ranks, begin, end, share, logsumexp):
    """Part of the weight in pages whose ranks are still float32."""
    weight = 0.0
    for page in range(begin, end):
        weight += math.exp(load_f32(ranks + 4 * page) * share - logsumexp)
    return weight


@jit
def _enough(keys, chosen, count, share, logsumexp, wanted, weights):
    """Keeps of the chosen pages the fewest that hold the part `wanted` of the weight, at least one; returns how many.

    A threshold bit by bit from the top; of equal pages the earlier ones.
    """
    for i in range(count):
        key = load_i32(keys + 4 * load_i32(chosen + 4 * i))
        rank = float_of_bits(key ^ ((key >> 31) & 0x7FFFFFFF))
        store_f32(weights + 4 * i, math.exp(rank * share - logsumexp))
    threshold = -(2**31)
    for bit in range(31, -1, -1):
        held, number = _reaching(keys, chosen, count, weights, threshold + (1 << bit))
        if number > 0 and held >= wanted:
            threshold += 1 << bit
    held, kept = _reaching(keys, chosen, count, weights, threshold + 1)
    best, kept = kept, 0
    for i in range(count):
        page = load_i32(chosen + 4 * i)
        key = load_i32(keys + 4 * page)
        tie = key == threshold and (held < wanted or best + kept == 0)
        if tie:
            held += load_f32(weights + 4 * i)
        if key > threshold or tie:
            store_i32(chosen + 4 * kept, page)
            kept += 1
    return kept


@jit
def _reaching(keys, chosen, count, weights, threshold):
    """Weight and number of the chosen pages whose keys are no less than the threshold."""
    held, number = 0.0, 0
    for i in range(count):
        if load_i32(keys + 4 * load_i32(chosen + 4 * i)) >= threshold:
            held += load_f32(weights + 4 * i)
            number += 1
    return held, number


@jit
def _rank(scores, group, total, own, scale, ranks):
    """ranks[own]: the scores of a single head, or the largest share of the group's."""
    for g in range(group):
        row = scores + 4 * total * g
        logsumexp = _logsumexp(row, own, scale) if group > 1 else 0.0
        share, less = vsplat(scale), vsplat(logsumexp)
        whole = own // LANES * LANES
        for i in range(0, whole, LANES):
            value = vload(row + 4 * i)
            if group > 1:
                value = vsub(vmul(value, share), less)
            if g > 0:
                value = vmax(value, vload(ranks + 4 * i))
            vstore(ranks + 4 * i, value)
        _rank_tail(row, whole, own, scale, logsumexp, group, g, ranks)


@jit
def _rank_tail(row, begin, own, scale, less, group, g, ranks):
    for i in range(begin, own):
        value = load_f32(row + 4 * i)
        if group > 1:
            value = value * scale - less
        if g > 0:
            value = max(value, load_f32(ranks + 4 * i))
        store_f32(ranks + 4 * i, value)


@jit
def _logsumexp(row, own, scale):
    whole = own // LANES * LANES
    tops = vsplat(LOWEST)
    for i in range(0, whole, LANES):
        tops = vmax(vload(row + 4 * i), tops)
    top = vreduce_max(tops)
    for i in range(whole, own):
        top = max(top, load_f32(row + 4 * i))
    sums, least, share = vsplat(0.0), vsplat(top), vsplat(scale)
    for i in range(0, whole, LANES):
        sums = vadd(sums, vexp(vmul(vsub(vload(row + 4 * i), least), share)))
    total = vreduce_add(sums)
    for i in range(whole, own):
        total += vreduce_max(vexp(vsplat((load_f32(row + 4 * i) - top) * scale)))
    return top * scale + math.log(total)


@jit
def _order_bits(keys, low, high):
    """float32 to int32 of the same order, in place: negative numbers count down from their sign bit."""
    for page in range(low, high):
        bits = load_i32(keys + 4 * page)
        bits = 0 if bits == -(2**31) else bits  # -0.0 is no less than 0.0
        store_i32(keys + 4 * page, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@jit
def _threshold(keys, low, high, wanted, bins, candidates):
    """A threshold, and how many keys equal to it are wanted beside all larger ones: `wanted` in total.

    Digit by digit from the top: the keys that share the digit of the last one wanted are candidates for the next.
    """
    source, count = keys + 4 * low, high - low
    prefix, shift = 0, 32
    while shift > 0 and wanted > 0:
        shift -= DIGIT
        zero_bytes(bins, 4 * BINS)
        for i in range(count):
            at = bins + 4 * _digit(load_i32(source + 4 * i), shift)
            store_i32(at, load_i32(at) + 1)
        value = BINS - 1
        while value > 0 and load_i32(bins + 4 * value) < wanted:
            wanted -= load_i32(bins + 4 * value)
            value -= 1
        prefix = (prefix << DIGIT) | value
        if load_i32(bins + 4 * value) == wanted:
            # All of these, however their lower digits differ.
            return (prefix << shift) - 2**31 - 1, 0
        kept = 0
        for i in range(count):
            key = load_i32(source + 4 * i)
            if _digit(key, shift) == value:
                store_i32(candidates + 4 * kept, key)
                kept += 1
        source, count = candidates, kept
    return prefix - 2**31, wanted


@jit
def _digit(key, shift):
    return ((key + 2**31) >> shift) & (BINS - 1)


@jit
def _worker(block):
    _work(block)
    release(block)


_task = task_address(_worker)
