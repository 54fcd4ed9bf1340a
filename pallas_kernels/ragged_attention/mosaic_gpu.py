"""ragged_attention for Hopper: FlashAttention-2's loop on wgmma, one warpgroup to a tile of queries.

A block has 128 rows: the query heads of one KV head, a tile of tokens each. Keys and values come by TMA through the page
table, 64 tokens at a time, and serve both halves of the rows. Two blocks share a processor, so that one has the tensor cores
while the other is at its softmax. Keys are taken in blocks at fixed multiples of 64 and a query's row of the tile feels no
other, so a token's result depends neither on its neighbours nor on where its prompt was cut.

Flops: 4 * D for every row of the tile and every key of a block that one of them sees: a causal tile of n tokens computes
some 32 + n / 2 keys a row more than it needs, and a tile that its tokens do not fill is computed whole.
Bytes: a tile reads its keys and values once, 4 * D * keys, that is 128 flops a byte; tiles of one row run beside one another
and find them in the second-level cache, so memory gives them about once. Queries are read once; outputs are written by
tiles and then gathered into the tokens' order, 3 times their size, where clearing what no row owns would take 2.

Packed pools: codes come as they are and are opened to bfloat16 in shared memory, once for both halves of the rows, which rounds
keys and values to 8 bits of mantissa. Their words, 8 bytes a key and head, are gathered into the order of all rows' page tables
first (a page's own 64 bytes of words cannot be copied next to another's), whether a row has queries in this step or not.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import (
    accumulate,
    pl,
    plgpu,
    processors,
    stage_types,
    swizzled,
    wgmma_from_registers,
)
from pallas_kernels._roles import Role, launch
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.ragged_attention._query_tiles import (
    ALIGNED,
    END,
    FIRST,
    LENGTH,
    POSITION,
    ROW,
    TOKEN,
    query_tiles,
)

WGMMA_ROWS = 64
HALVES = 2  # of a tile's rows, one after the other: two accumulators are all that the registers hold
ROWS = HALVES * WGMMA_ROWS
KEYS = 64  # of a step
COPY = 16  # keys that one warp copies for a step
STAGES = 2  # 96 KiB in all, so that two blocks share a processor and one has the tensor cores while the other is at its softmax
# Added to scores that do not count; far below the first maximum, so that their weights are 0 even before a score that does.
LOWEST, LOWEST_TOP = -1e30, -1e15
# A gather brings the words of packed keys and values, 4 bytes a token and head, into the order of the rows' pages.
MOST_WORD_BYTES = 1 << 28
LOG2_E = math.log2(math.e)


def ragged_attention(
    q: jax.Array,
    k_pages: jax.Array | PackedPages,
    v_pages: jax.Array | PackedPages,
    layer: jax.Array | int,
    page_table: jax.Array,
    query_start: jax.Array,
    query_len: jax.Array,
    kv_len: jax.Array,
    *,
    scale: float,
    window: jax.Array | int,
) -> jax.Array:
    """See `api.ragged_attention`."""
    args = (q, k_pages, v_pages, layer, page_table, query_start, query_len, kv_len)
    return launch(role(*args, scale=scale, window=window), "ragged_attention")


def role(
    q, k_pages, v_pages, layer, page_table, query_start, query_len, kv_len, *, scale: float, window
) -> Role:
    """A block for each tile of queries and KV head; the tiles come first among the inputs, those left over last."""
    tokens, q_heads, head_dim = q.shape
    layers, pages, kv_heads, page_size, _ = k_pages.shape
    group = q_heads // kv_heads
    processors()
    check(q, k_pages, v_pages)
    if scale <= 0:
        raise NotImplementedError(f"scale {scale}; above 0")
    size = tile_tokens(group)
    padded = max(-(-tokens // ALIGNED) * ALIGNED, size)
    rows = (a.astype(jnp.int32) for a in (query_start, query_len, kv_len))
    tiles, slots = query_tiles(*rows, tokens=padded, size=size)
    queries = jnp.pad(q.reshape(tokens, -1), ((0, padded - tokens), (0, 0)))
    packed = isinstance(k_pages, PackedPages)
    arrays = (k_pages.codes, v_pages.codes) if packed else (k_pages, v_pages)
    pools = [a.reshape(layers, pages * kv_heads, page_size, -1) for a in arrays]
    if packed:
        pools += [listed_words(a.words, layer, page_table) for a in (k_pages, v_pages)]
    return Role(
        grid=(len(tiles), kv_heads),
        body=functools.partial(attend_tile, group=group, kv_heads=kv_heads, scale=scale * LOG2_E),
        inputs=(tiles, page_table.astype(jnp.int32), scalars(layer, window), queries, *pools),
        outputs=(jax.ShapeDtypeStruct((len(tiles) * size, q_heads * head_dim), q.dtype),),
        scratch=scratch_types(group, head_dim, k_pages.shape[4] if packed else 0),
        finish=lambda out: out.at[slots[:tokens]].get(mode="fill", fill_value=0).reshape(q.shape),
    )


def check(q: jax.Array, k_pages: jax.Array | PackedPages, v_pages: jax.Array | PackedPages) -> None:
    """Raises NotImplementedError for what the kernel does not take."""
    head_dim, page_size, group = q.shape[2], k_pages.shape[3], q.shape[1] // k_pages.shape[2]
    types = [
        f"{a.bits(head_dim)} bits" if isinstance(a, PackedPages) else a.dtype.name
        for a in (q, k_pages, v_pages)
    ]
    if types[0] != "bfloat16" or types[1] != types[2] or types[1] not in ("bfloat16", "8 bits", "4 bits"):
        raise NotImplementedError(
            f"queries, keys and values of {', '.join(types)}; bfloat16, or both packed alike"
        )
    if types[1] == "4 bits" and head_dim != 128:
        raise NotImplementedError(f"4 bits of head dimension {head_dim}; 128")
    if head_dim not in (64, 128) or page_size not in (16, 32):
        raise NotImplementedError(f"head dimension {head_dim}, page size {page_size}; 64 or 128, 16 or 32")
    if group > ROWS // 8:
        raise NotImplementedError(f"{group} query heads to a KV head; at most {ROWS // 8}")


def tile_tokens(group: int) -> int:
    """Tokens of a tile: a multiple of 8, as shared memory is tiled so."""
    return ROWS // group // 8 * 8


def pieces(group: int) -> list[tuple[int, int, pl.Slice, int]]:
    """How a tile's rows are copied: the query head, the half and rows of it, and the first of their tokens in the tile."""
    size, found = tile_tokens(group), []
    for g in range(group):
        cuts = sorted(
            {g * size, (g + 1) * size, *range(0, ROWS, WGMMA_ROWS)} & {*range(g * size, (g + 1) * size + 1)}
        )
        for start, stop in itertools.pairwise(cuts):
            half, row = divmod(start, WGMMA_ROWS)
            found.append((g, half, pl.ds(row, stop - start), start - g * size))
    return found


def scalars(layer: jax.Array | int, window: jax.Array | int) -> jax.Array:
    """The layer and the window, the largest number for none: int32 [2]."""
    largest = jnp.iinfo(jnp.int32).max
    window = jnp.asarray(window, jnp.int32)
    return jnp.stack([jnp.asarray(layer, jnp.int32), jnp.where(window > 0, window, largest)])


def listed_words(words: jax.Array, layer: jax.Array | int, page_table: jax.Array) -> jax.Array:
    """Words [L, N, Hkv, page] of the rows' pages, which are filled up to whole steps: int32 [S, Hkv, tokens]."""
    size = 4 * page_table.size * words.shape[2] * words.shape[3]
    if size > MOST_WORD_BYTES:
        raise NotImplementedError(
            f"{size} bytes of steps and smallest values in the rows' order; {MOST_WORD_BYTES}"
        )
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % (KEYS // words.shape[3]))))
    found = words[layer, table].swapaxes(1, 2)
    return found.reshape(*found.shape[:2], -1)


def scratch_types(group: int, head_dim: int, code_bytes: int) -> dict:
    """What a block needs of shared memory and barriers; `code_bytes`: of a packed vector, 0 for bfloat16."""
    tile, step = (
        plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled(head_dim))
        for shape in ((HALVES, WGMMA_ROWS, head_dim), (STAGES, KEYS, head_dim))
    )
    arrived = plgpu.Barrier(num_arrivals=KEYS // COPY + (code_bytes > 0), num_barriers=STAGES)
    opened = {}
    if code_bytes:
        wide = plgpu.SMEM((2, KEYS, head_dim), jnp.bfloat16, transforms=swizzled(head_dim))
        words = plgpu.SMEM((STAGES, KEYS), jnp.int32)
        opened = {"wide": wide, "k_words": words, "v_words": words}
        columns = min(code_bytes, 64)
        transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns)  # type: ignore[abstract]
        step = plgpu.SMEM((STAGES, KEYS, code_bytes), jnp.uint8, transforms=transforms)
    return {
        **opened,
        "q_tile": tile,
        "k_ring": step,
        "v_ring": step,
        "stage": stage_types((WGMMA_ROWS, KEYS), jnp.bfloat16),
        "q_arrived": plgpu.Barrier(num_arrivals=len(pieces(group))),
        "k_arrived": arrived,
        "v_arrived": arrived,
    }


def attend_tile(
    tile, head, tiles, page_table, scalars, q, k_pages, v_pages, *rest,
    q_tile, k_ring, v_ring, stage, q_arrived, k_arrived, v_arrived, group, kv_heads, scale,
    wide=None, k_words=None, v_words=None,
):  # fmt: skip
    """One tile of queries and one KV head.

    tiles: int32 [tiles, 6], see `_query_tiles`; scalars: see `scalars`; q, out: [tokens, Hq * D], out by tiles;
    k_pages, v_pages: [L, N * Hkv, page, D] or codes of as many; rest: words of both, see `listed_words`, where they are codes,
    and out; scale: to powers of two.
    """
    *list_words, out = rest
    head_dim, page_size = q_tile.shape[2], k_pages.shape[2]
    size = tile_tokens(group)
    token, first, end, length = (tiles[tile, field] for field in (TOKEN, FIRST, END, LENGTH))
    window = scalars[1]
    # From the last keys to the first: the step that may hold what no token has written comes first.
    blocks = (end + KEYS - 1) // KEYS
    count = blocks - jnp.maximum(first + 1 - window, 0) // KEYS
    # All tokens of the tile see all keys of the steps from `plain` to `narrow`.
    plain = blocks - (first + 1) // KEYS
    narrow = blocks - (jnp.maximum(end - window, 0) + KEYS - 1) // KEYS
    layout = plgpu.Layout.WGMMA

    def request(step, which):
        """Copies what a step takes of the keys (which 0) or of the values (1) into its slot."""
        pages, ring, arrived = ((k_pages, k_ring, k_arrived), (v_pages, v_ring, v_arrived))[which]

        @pl.when(step < count)
        def _():
            slot = lax.rem(step, STAGES)

            @plgpu.warp_map
            def _(warp):
                row = tiles[tile, ROW]  # as the layer, read again and not kept in registers
                key = jnp.minimum((blocks - 1 - step) * KEYS + warp * COPY, end - 1)
                at = page_table[row, key // page_size] * kv_heads + head
                inside = lax.rem(key, page_size) // COPY * COPY
                source = pages.at[scalars[0], at, pl.ds(inside, COPY)]
                plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(warp * COPY, COPY)], arrived.at[slot])
                if list_words:

                    @pl.when(warp == 0)
                    def _():
                        found = list_words[which].at[row, head, pl.ds((blocks - 1 - step) * KEYS, KEYS)]
                        plgpu.copy_gmem_to_smem(found, (k_words, v_words)[which].at[slot], arrived.at[slot])

    def along_rows(vector, columns):
        return lax.broadcast_in_dim(vector, (WGMMA_ROWS, columns), (0,))

    def vector(value):
        return plgpu.layout_cast(jnp.full((WGMMA_ROWS,), value, jnp.float32), layout.reduce(1))

    def zeros(columns):
        return plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, columns), jnp.float32), layout)

    def mask(half, step):
        """0 where a query sees a key of the step. Few steps ask, so what it needs is read again and not kept in registers."""
        position, window = tiles[tile, POSITION], scalars[1]
        at = plgpu.broadcasted_iota(jnp.int32, (WGMMA_ROWS,), 0, layout=layout.reduce(1)) + half * WGMMA_ROWS
        last = along_rows(lax.rem(at, size) + position, KEYS)  # tokens lie head by head
        key = plgpu.broadcasted_iota(jnp.int32, (WGMMA_ROWS, KEYS), 1, layout=layout)
        key = key + (blocks - 1 - step) * KEYS
        return jnp.where((key <= last) & (key > last - window), 0.0, LOWEST)

    def clear(ring):
        """Of the first step: what no token has written may be NaN, and NaN times a weight of 0 is NaN."""
        found = plgpu.load(ring.at[0], layout=layout, optimized=False)
        key = plgpu.broadcasted_iota(jnp.int32, found.shape, 0, layout=layout) + (blocks - 1) * KEYS
        ring[0] = jnp.where(key < length, found, jnp.zeros_like(found))
        plgpu.commit_smem()

    def widen(ring, words, slot, step, to):
        """What the codes of a slot stand for, nothing from `end` on: no token of the tile sees it, and none may have written it."""
        found = plgpu.load(words.at[slot], layout=layout.reduce(1), optimized=False)
        key = (
            plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=layout.reduce(1))
            + (blocks - 1 - step) * KEYS
        )
        width = min(ring.shape[2], 64)
        step_and_low = [
            along_rows(jnp.where(key < end, lax.bitcast_convert_type(bits, jnp.float32), 0.0), width)
            for bits in (found & -0x10000, found << 16)
        ]
        for begin in range(0, ring.shape[2], width):
            codes = plgpu.load(ring.at[slot, :, pl.ds(begin, width)], layout=layout, optimized=False).astype(
                jnp.int32
            )
            parts = [codes] if ring.shape[2] == head_dim else [codes & 15, codes >> 4]
            for half, part in enumerate(parts):
                values = part.astype(jnp.float32) * step_and_low[0] + step_and_low[1]
                to[:, pl.ds(begin + half * ring.shape[2], width)] = values.astype(jnp.bfloat16)

    def open_step(step, slot):
        """Keys and values of a step, ready to be multiplied."""
        if not list_words:
            pl.when(step > 0)(lambda: plgpu.barrier_wait(k_arrived.at[slot]))
            return k_ring.at[slot], v_ring.at[slot]
        plgpu.commit_smem()  # every warp has multiplied the last step
        # Keys and values change places from step to step: were they fixed, the compiler would keep what describes each of
        # their operands to the tensor cores in registers, which then do not suffice beside another role.
        place = lax.rem(step, 2)
        pair = wide.at[place], wide.at[1 - place]
        for which, ring, words, arrived, to in (
            (0, k_ring, k_words, k_arrived, pair[0]),
            (1, v_ring, v_words, v_arrived, pair[1]),
        ):
            plgpu.barrier_wait(arrived.at[slot])
            widen(ring, words, slot, step, to)
            plgpu.commit_smem()
            request(step + STAGES, which)
        return pair

    def one_half(half, step, slot, pair, carry):
        keys, values = pair
        top, summed, acc = carry

        def multiply_keys(scores):
            plgpu.wgmma(scores, q_tile.at[half], keys.T)
            plgpu.wgmma_wait(0)

        some_do_not_see = (step < plain) | (step >= narrow)
        scores = lax.cond(some_do_not_see, lambda: mask(half, step), lambda: zeros(KEYS))
        scores = accumulate(multiply_keys, scores)
        if half == HALVES - 1 and not list_words:
            plgpu.commit_smem()  # every warp has read the slot
            request(step + STAGES, 0)
        new_top = jnp.maximum(top, scores.max(axis=1) * scale)
        keep = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * scale - along_rows(new_top, KEYS))
        summed = summed * keep + weights.sum(axis=1)

        def multiply_values(total):
            wgmma_from_registers(total, weights.astype(jnp.bfloat16), values, stage)
            plgpu.wgmma_wait(0)

        if half == 0 and not list_words:
            pl.when(step > 0)(lambda: plgpu.barrier_wait(v_arrived.at[slot]))
        return new_top, summed, accumulate(multiply_values, acc * along_rows(keep, head_dim))

    def one_step(step, carries):
        slot = lax.rem(step, STAGES)
        pair = open_step(step, slot)
        carries = tuple(one_half(half, step, slot, pair, carry) for half, carry in enumerate(carries))
        if not list_words:
            plgpu.commit_smem()
            request(step + STAGES, 1)
        return carries

    @pl.when(count > 0)
    def _():
        tokens = pl.multiple_of(token, ALIGNED)
        columns = [pl.ds((head * group + g) * head_dim, head_dim) for g in range(group)]
        for g, half, rows, offset in pieces(group):
            source = q.at[pl.ds(tokens + offset, rows.size), columns[g]]
            plgpu.copy_gmem_to_smem(source, q_tile.at[half, rows], q_arrived)
        for step in range(STAGES):
            request(step, 0)
            request(step, 1)
        plgpu.barrier_wait(q_arrived)
        if not list_words:
            plgpu.barrier_wait(k_arrived.at[0])
            plgpu.barrier_wait(v_arrived.at[0])

            @pl.when(blocks * KEYS > length)
            def _():
                clear(k_ring)
                clear(v_ring)

        start = (vector(LOWEST_TOP), vector(0.0), zeros(head_dim))
        for half, (_, summed, acc) in enumerate(lax.fori_loop(0, count, one_step, (start,) * HALVES)):
            q_tile[half] = (acc * along_rows(1 / summed, head_dim)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        for g, half, rows, offset in pieces(group):
            to = out.at[pl.ds(tile * size + offset, rows.size), columns[g]]
            plgpu.copy_smem_to_gmem(q_tile.at[half, rows], to)
        plgpu.wait_smem_to_gmem(0)
