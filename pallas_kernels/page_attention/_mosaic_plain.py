"""page_attention for Hopper over pools of bfloat16: pages come by TMA, one to a warp, and go through mma from shared memory."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import mma, pl, plgpu, swizzled
from pallas_kernels.page_attention._mosaic_packed import LOWEST, PAGES, ROWS


def scratch(page_size: int, head_dim: int) -> dict:
    """Of a block that attends to one part: what it writes takes the place of what it no longer reads."""
    query, weights, *written = _tiles(page_size, head_dim)
    return _rings(page_size, head_dim) | {"tiles": plgpu.RefUnion((query, weights), tuple(written))}


def queue_scratch(page_size: int, head_dim: int) -> dict:
    """Of attend_queue, where the next part's query comes before this one is written."""
    query, weights, *written = _tiles(page_size, head_dim)
    tiles = plgpu.RefUnion((weights,), tuple(written))
    return _rings(page_size, head_dim) | {"q_tile": query, "tiles": tiles}


def _tiles(page_size, head_dim):
    keys = PAGES * page_size
    return (
        plgpu.SMEM((ROWS, head_dim), jnp.bfloat16, transforms=swizzled(head_dim)),
        plgpu.SMEM((ROWS, keys), jnp.bfloat16, transforms=swizzled(keys)),
        plgpu.SMEM((ROWS, head_dim), jnp.float32),
        plgpu.SMEM((2, ROWS), jnp.float32),
    )


def _rings(page_size, head_dim):
    stages = 3 if page_size == 16 else 2
    ring = plgpu.SMEM((stages, PAGES * page_size, head_dim), jnp.bfloat16, transforms=swizzled(head_dim))
    arrived = plgpu.Barrier(num_arrivals=PAGES, num_barriers=stages)
    return {
        "k_ring": ring,
        "v_ring": ring,
        "k_arrived": arrived,
        "v_arrived": arrived,
        "q_arrived": plgpu.Barrier(),
    }


class _Part(NamedTuple):
    """Of a row's list for a head; no steps where there is no such part.

    Attributes:
      length: tokens of the list.
      begin: its first step, counted over the list.
      steps: how many.
      request: copies the pages of one of its steps, if there is such a step, into a slot of the ring.
    """

    length: jax.Array
    begin: jax.Array
    steps: jax.Array
    request: Callable[..., None]


def _part_of(
    row, head, part, page_lists, tokens, layer, k_pages, v_pages,
    *, k_ring, v_ring, k_arrived, v_arrived, each, kv_heads, exists=True,
) -> _Part:  # fmt: skip
    _, lists, width = page_lists.shape
    mine, reads = head if lists > 1 else 0, head // max(lists // kv_heads, 1)
    keys = k_ring.shape[1]
    page_size = keys // PAGES
    length = jnp.clip(tokens[row, mine], 0, width * page_size)
    begin = part * each
    count = jnp.where(exists, jnp.clip((length + keys - 1) // keys - begin, 0, each), 0)

    def request(step, slot):
        @pl.when((step >= 0) & (step < count))
        def _():
            @plgpu.warp_map
            def _(warp):
                page = page_lists[row, mine, jnp.minimum((begin + step) * PAGES + warp, width - 1)]
                at, to = page * kv_heads + reads, pl.ds(warp * page_size, page_size)
                plgpu.copy_gmem_to_smem(k_pages.at[layer[0], at], k_ring.at[slot, to], k_arrived.at[slot])
                plgpu.copy_gmem_to_smem(v_pages.at[layer[0], at], v_ring.at[slot, to], v_arrived.at[slot])

    return _Part(length, begin, count, request)


def _layouts():
    layout = plgpu.Layout
    return (make(jnp.bfloat16, m_warps=1) for make in (layout.MMA_LHS, layout.MMA_RHS, layout.MMA_ACC))


def _along_rows(vector, columns):
    return lax.broadcast_in_dim(vector, (ROWS, columns), (0,))


def _attend(part: _Part, queries, first, ahead, p_tile, *, k_ring, v_ring, k_arrived, v_arrived, scale):
    """The part's maxima, sums and output.

    Args:
      first: number of its first step in the ring.
      ahead: asks for what follows a step of the part, into the slot of the step before it.
    """
    left, right, total = _layouts()
    stages, keys, head_dim = k_ring.shape

    def one_step(step, carry):
        top, summed, acc = carry
        slot = lax.rem(first + step, stages)
        plgpu.commit_smem()
        ahead(step)
        plgpu.barrier_wait(k_arrived.at[slot])
        k = plgpu.load(k_ring.at[slot].T, layout=right, optimized=False)
        scores = mma(plgpu.layout_cast(jnp.zeros((ROWS, keys), jnp.float32), total), queries, k) * scale
        held = part.length - (part.begin + step) * keys
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), 1, layout=total)
        scores = jnp.where(column < held, scores, LOWEST)
        new_top = jnp.maximum(top, scores.max(axis=1))
        keep = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - _along_rows(new_top, keys))
        summed = summed * keep + weights.sum(axis=1)
        p_tile[...] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        weights = plgpu.load(p_tile, layout=left, optimized=False)
        plgpu.barrier_wait(v_arrived.at[slot])
        v = plgpu.load(v_ring.at[slot], layout=right, optimized=False)
        # What no token has written may be NaN, and NaN times a weight of 0 is NaN.
        token = plgpu.broadcasted_iota(jnp.int32, (keys, head_dim), 0, layout=right)
        v = jnp.where(token < held, v, jnp.zeros_like(v))
        return new_top, summed, mma(acc * _along_rows(keep, head_dim), weights, v)

    def vector(value):
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), total.reduce(1))

    acc = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), total)
    found = lax.fori_loop(0, part.steps, one_step, (vector(LOWEST), vector(0.0), acc))
    plgpu.commit_smem()
    return found


def _write(found, out_tile, statistics_tile, out, statistics):
    """out: [G, D] and statistics: [2, ROWS] of the part; the copies are under way."""
    statistics_tile[0, :], statistics_tile[1, :], out_tile[...] = found
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, out.shape[0])], out)
    plgpu.copy_smem_to_gmem(statistics_tile, statistics)


def attend_part(
    row, head, part, page_lists, tokens, layer, q, k_pages, v_pages, out, statistics,
    *, tiles, q_arrived, each, kv_heads, scale, **rings,
):  # fmt: skip
    """One part, by a block of its own."""
    (q_tile, p_tile), (out_tile, statistics_tile) = tiles
    stages = rings["k_ring"].shape[0]
    lists = page_lists, tokens, layer, k_pages, v_pages
    mine = _part_of(row, head, part, *lists, **rings, each=each, kv_heads=kv_heads)
    plgpu.copy_gmem_to_smem(q.at[row, head], q_tile, q_arrived)
    for step in range(stages - 1):
        mine.request(step, step)
    plgpu.barrier_wait(q_arrived)
    queries = plgpu.load(q_tile, layout=next(_layouts()), optimized=False)

    def ahead(step):
        mine.request(step + stages - 1, lax.rem(step + stages - 1, stages))

    found = _attend(mine, queries, 0, ahead, p_tile, **rings, scale=scale)
    _write(found, out_tile, statistics_tile, out.at[row, head, part], statistics.at[row, head, part])
    plgpu.wait_smem_to_gmem(0)


def attend_queue(
    first, every, page_lists, tokens, layer, q, k_pages, v_pages, out, statistics,
    *, q_tile, tiles, q_arrived, each, kv_heads, scale, **rings,
):  # fmt: skip
    """Every n-th part from the first one on, the heads fastest; the ring goes on from a part to the next."""
    (p_tile,), (out_tile, statistics_tile) = tiles
    rows, heads, parts = out.shape[:3]
    stages = rings["k_ring"].shape[0]
    lists = page_lists, tokens, layer, k_pages, v_pages
    size = rows * heads * parts

    def place(number):
        """A list that has ended has so in its last parts: were they fastest, some blocks could have only those."""
        return lax.rem(lax.div(number, heads), rows), lax.rem(number, heads), lax.div(number, rows * heads)

    def part_at(number) -> _Part:
        row, head, part = place(jnp.minimum(number, size - 1))
        return _part_of(row, head, part, *lists, **rings, each=each, kv_heads=kv_heads, exists=number < size)

    def request_query(number):
        @pl.when(number < size)
        def _():
            row, head, _ = place(number)
            plgpu.copy_gmem_to_smem(q.at[row, head], q_tile, q_arrived)

    def one_part(i, done):
        number = first + i * every
        mine, after = part_at(number), part_at(number + every)
        plgpu.barrier_wait(q_arrived)
        queries = plgpu.load(q_tile, layout=next(_layouts()), optimized=False)
        plgpu.commit_smem()
        request_query(number + every)

        def ahead(step):
            last = step + stages - 1
            slot = lax.rem(done + last, stages)
            mine.request(last, slot)
            after.request(last - mine.steps, slot)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the part before
        found = _attend(mine, queries, done, ahead, p_tile, **rings, scale=scale)
        for step in range(stages - 1):  # that no step of a short part has asked for
            short = mine.steps < stages - 1 - step
            pl.when(short)(lambda: after.request(step, lax.rem(done + mine.steps + step, stages)))  # noqa: B023
        row, head, part = place(number)
        _write(found, out_tile, statistics_tile, out.at[row, head, part], statistics.at[row, head, part])
        return done + mine.steps

    request_query(first)
    begins = part_at(first)
    for step in range(stages - 1):
        begins.request(step, step)
    lax.fori_loop(0, (size - first + every - 1) // every, one_part, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
