"""page_attention for Hopper over packed pools: the codes go through the tensor cores as they are.

Codes of at most 8 bits are exact in bfloat16, so a key's step and smallest value need only be applied to its score,
score = step * (q . codes) + low * sum(q), and a value's to its weight: out = (weight * step) @ codes + weight . low. Codes become
bfloat16 in a tile of shared memory, as the tensor cores' operands cannot be read from bytes.

Bytes: D * bits / 8 + 4 per listed key and as many per value, which is the floor; beside it what the parts write, as
in mosaic_gpu, and 8 more per key and per value, as a gather lays the lists' words out in order first (a page's own 64 bytes
of words cannot be copied next to another's: copies want 128). They are written to be read at once, so mostly in the
cache: with 4 bits and D 128 12 % more through the cache, 6 % more from memory.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import mma, pl, plgpu, swizzled

# Pages of one step, one for each warp of the warpgroup to copy.
PAGES = 4
# Rows of the tensor core's smallest tile: the query heads of a KV head, padded.
ROWS = 16
WIDENED = 64  # keys at a time: more take registers that another role beside this one has not left
LOWEST = -1e30


def scratch(page_size: int, head_dim: int, code_bytes: int) -> dict:
    keys, stages = PAGES * page_size, 4 if page_size == 16 else 3
    codes = plgpu.SMEM(
        (stages, keys, code_bytes),
        jnp.uint8,
        transforms=(plgpu.TilingTransform((8, code_bytes)), plgpu.SwizzleTransform(code_bytes)),  # type: ignore[abstract]
    )
    words = plgpu.SMEM((stages, keys), jnp.int32)
    tile, query = (
        plgpu.SMEM((head_dim // code_bytes, rows, code_bytes), jnp.bfloat16, transforms=swizzled(code_bytes))
        for rows in (keys, ROWS)
    )
    weights = plgpu.SMEM((ROWS, keys), jnp.bfloat16, transforms=swizzled(keys))
    arrived = plgpu.Barrier(num_arrivals=PAGES + 1, num_barriers=stages)
    return {
        "k_ring": codes,
        "v_ring": codes,
        "k_words": words,
        "v_words": words,
        "tile": tile,
        "tiles": plgpu.RefUnion(
            (query, weights),
            (plgpu.SMEM((ROWS, head_dim), jnp.float32), plgpu.SMEM((2, ROWS), jnp.float32)),
        ),
        "k_arrived": arrived,
        "v_arrived": arrived,
        "q_arrived": plgpu.Barrier(),
    }


def attend_part(
    row, head, part, page_lists, tokens, layer, q, q_sums, k_pages, v_pages, k_list_words, v_list_words, out, statistics,
    *, k_ring, v_ring, k_words, v_words, tile, tiles, k_arrived, v_arrived, q_arrived, each, kv_heads, scale,
):  # fmt: skip
    """As mosaic_gpu's; q_sums: float32 [S, H, ROWS], the sums of q's rows; *_list_words: int32 [S, H, tokens of a list]."""
    (q_tile, p_tile), (out_tile, statistics_tile) = tiles
    _, lists, width = page_lists.shape
    mine, reads = head if lists > 1 else 0, head // max(lists // kv_heads, 1)
    stages, keys, _ = k_ring.shape
    halves, _, columns = tile.shape
    page_size = keys // PAGES
    length = jnp.clip(tokens[row, mine], 0, width * page_size)
    steps = (length + keys - 1) // keys
    begin = part * each
    count = jnp.clip(steps - begin, 0, each)

    def request(step):
        """Copies the pages of a step into its slot of the ring."""

        @pl.when(step < count)
        def _():
            slot = lax.rem(step, stages)

            @plgpu.warp_map
            def _(warp):
                page = page_lists[row, mine, jnp.minimum((begin + step) * PAGES + warp, width - 1)]
                at, to = page * kv_heads + reads, pl.ds(warp * page_size, page_size)
                of_keys, of_values = k_arrived.at[slot], v_arrived.at[slot]
                plgpu.copy_gmem_to_smem(k_pages.at[layer[0], at], k_ring.at[slot, to], of_keys)
                plgpu.copy_gmem_to_smem(v_pages.at[layer[0], at], v_ring.at[slot, to], of_values)

                @pl.when(warp == 0)
                def _():
                    span = pl.ds((begin + step) * keys, keys)
                    plgpu.copy_gmem_to_smem(k_list_words.at[row, head, span], k_words.at[slot], of_keys)
                    plgpu.copy_gmem_to_smem(v_list_words.at[row, head, span], v_words.at[slot], of_values)

    plgpu.copy_gmem_to_smem(q.at[row, head], q_tile, q_arrived)
    for step in range(stages - 1):
        request(step)
    plgpu.barrier_wait(q_arrived)

    layout = plgpu.Layout
    left, right, total = (
        make(jnp.bfloat16, m_warps=1) for make in (layout.MMA_LHS, layout.MMA_RHS, layout.MMA_ACC)
    )
    queries = [plgpu.load(q_tile.at[half], layout=left, optimized=False) for half in range(halves)]
    sums = plgpu.load(q_sums.at[row, head], layout=total.reduce(1), optimized=False)

    def along_rows(vector, columns):
        return lax.broadcast_in_dim(vector, (ROWS, columns), (0,))

    def along_columns(vector):
        return lax.broadcast_in_dim(vector, (ROWS, keys), (1,))

    def widen(ring, slot):
        """The codes of a slot into `tile`."""
        for row in range(0, keys, WIDENED):
            some = pl.ds(row, WIDENED)
            codes = plgpu.load(ring.at[slot, some], layout=layout.WGMMA, optimized=False).astype(jnp.int32)
            for half, values in enumerate([codes] if halves == 1 else [codes & 15, codes >> 4]):
                tile[half, some] = values.astype(jnp.float32).astype(jnp.bfloat16)
        plgpu.commit_smem()

    def steps_and_lows(words, slot, held):
        found = plgpu.load(words.at[slot], layout=total.reduce(0), optimized=False)
        return (
            jnp.where(held, lax.bitcast_convert_type(bits, jnp.float32), 0.0)
            for bits in (found & -0x10000, found << 16)
        )

    def one_step(step, carry):
        top, summed, rest, acc = carry
        slot = lax.rem(step, stages)
        plgpu.commit_smem()
        request(step + stages - 1)
        plgpu.barrier_wait(k_arrived.at[slot])
        held = length - (begin + step) * keys
        seen = plgpu.broadcasted_iota(jnp.int32, (keys,), 0, layout=total.reduce(0)) < held
        widen(k_ring, slot)
        sizes, lows = steps_and_lows(k_words, slot, seen)
        products = plgpu.layout_cast(jnp.zeros((ROWS, keys), jnp.float32), total)
        for half in range(halves):
            k = plgpu.load(tile.at[half].T, layout=right, optimized=False)
            products = mma(products, queries[half], k)
        scores = products * along_columns(sizes * scale) + along_rows(sums * scale, keys) * along_columns(
            lows
        )
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), 1, layout=total)
        scores = jnp.where(column < held, scores, LOWEST)
        new_top = jnp.maximum(top, scores.max(axis=1))
        keep = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - along_rows(new_top, keys))
        summed = summed * keep + weights.sum(axis=1)
        plgpu.barrier_wait(v_arrived.at[slot])
        sizes, lows = steps_and_lows(v_words, slot, seen)
        rest = rest * keep + (weights * along_columns(lows)).sum(axis=1)
        p_tile[...] = (weights * along_columns(sizes)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        weights = plgpu.load(p_tile, layout=left, optimized=False)
        widen(v_ring, slot)
        scale_to = along_rows(keep, columns)
        values = (plgpu.load(tile.at[half], layout=right, optimized=False) for half in range(halves))
        acc = tuple(mma(one * scale_to, weights, v) for one, v in zip(acc, values))
        return new_top, summed, rest, acc

    def vector(value):
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), total.reduce(1))

    acc = plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), total)
    first = (vector(LOWEST), vector(0.0), vector(0.0), (acc,) * halves)
    top, summed, rest, acc = lax.fori_loop(0, count, one_step, first)
    plgpu.commit_smem()
    for half in range(halves):
        out_tile[:, pl.ds(half * columns, columns)] = acc[half] + along_rows(rest, columns)
    statistics_tile[0, :] = top
    statistics_tile[1, :] = summed
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, out.shape[3])], out.at[row, head, part])
    plgpu.copy_smem_to_gmem(statistics_tile, statistics.at[row, head, part])
    plgpu.wait_smem_to_gmem(0)
