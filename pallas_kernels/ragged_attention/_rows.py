"""What decode and prefill share: the call's arrays, pages, and one step of the online softmax."""

from pallas_kernels._cpu.code import LANES
from pallas_kernels._cpu.frame import argument, dimension
from pallas_kernels._cpu.memory import jit, load_f32, load_i32, store_f32
from pallas_kernels._cpu.vector import (
    vadd,
    vexp,
    vfirst,
    vkeep,
    vload,
    vmax,
    vmul,
    vreduce_add,
    vreduce_max,
    vsplat,
    vstore,
    vsub,
)

# Stands for minus infinity in running maxima: finite, so that a difference of two of them is not NaN.
LOWEST = -1e30


@jit
def layer_pages(frame, which, size):
    """Address of the keys (which 1) or values (2) of the call's layer."""
    pool = argument(frame, which)
    page_bytes = dimension(frame, 1, 3) * dimension(frame, 1, 4) * size
    return pool + load_i32(argument(frame, 3)) * dimension(frame, 1, 1) * dimension(frame, 1, 2) * page_bytes


@jit
def page_offset(frame, table, page, head, size):
    """Where page number `page` of a row lies from layer_pages, for one KV head; `table` is the row's page table."""
    # A bad id must not read outside of the pool.
    page_id = min(max(load_i32(table + 4 * page), 0), dimension(frame, 1, 1) - 1)
    return (page_id * dimension(frame, 1, 2) + head) * dimension(frame, 1, 3) * dimension(frame, 1, 4) * size


@jit
def first_key(frame, position):
    """The first key that a query at `position` sees."""
    window = load_i32(argument(frame, 8))
    return max(0, position + 1 - window) if window > 0 else 0


@jit
def softmax_step(scores, columns, low, high, top, total, out, head_dim):
    """One row and one block of keys: scores become weights, out and total are scaled to the new maximum.

    scores: [columns], columns in whole vectors; keys low .. high of the block are seen; top, total: running maximum
    and sum; out: [head_dim], still to be divided by the sum
    """
    old = load_f32(top)
    largest = vsplat(old)
    for i in range(0, columns, LANES):
        value = vload(scores + 4 * i)
        if low > i or high < i + LANES:
            value = vkeep(value, low - i, high - i)
            vstore(scores + 4 * i, value)
        largest = vmax(value, largest)
    new = vreduce_max(largest)
    minus = vsplat(new)
    sums = vsplat(0.0)
    for i in range(0, columns, LANES):
        weight = vexp(vsub(vload(scores + 4 * i), minus))
        vstore(scores + 4 * i, weight)
        sums = vadd(sums, weight)
    keep = vexp(vsub(vsplat(old), minus))
    if new != old:
        scale_row(out, out, keep, head_dim)
        store_f32(top, new)
    store_f32(total, load_f32(total) * vfirst(keep) + vreduce_add(sums))


@jit
def divide_row(to, source, total, head_dim):
    """to = source / total: [head_dim], zeros where no key was seen."""
    value = load_f32(total)
    scale_row(to, source, vsplat(1.0 / value if value > 0 else 0.0), head_dim)


@jit
def scale_row(to, source, factor, count):
    """to = source * factor: [count]; factor is a vector of equal lanes."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        vstore(to + 4 * i, vmul(vload(source + 4 * i), factor))
    for i in range(whole, count):
        store_f32(to + 4 * i, load_f32(source + 4 * i) * vfirst(factor))
