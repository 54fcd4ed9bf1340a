"""page_attention for Hopper: one warpgroup per row, head and part of the list; pages come by TMA, four at a time.

Where a list is cut does not depend on the batch, so neither does the result.

Bytes: every listed page once, 4 * tokens * D * Hkv for bfloat16 keys and values, which is the floor; beside it the
parts' partial outputs, 8 * G * D + 16 * G bytes written and read, that is G / (2 * PART_STEPS * page) of the keys and
values, 3 % with G 4 and pages of 16, and 4 bytes per page id.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import mma, pl, plgpu, processors, swizzled
from pallas_kernels._roles import Role, launch
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.page_attention import _mosaic_packed
from pallas_kernels.page_attention._mosaic_packed import LOWEST, PAGES, ROWS

# Steps of a part, more where a list would fall into more than MAX_PARTS: at 256 tokens a part even a single row of
# 2,048 tokens and 8 KV heads keeps 6 MiB of copies in flight.
PART_STEPS = 4
MAX_PARTS = 64
LOG2_E = math.log2(math.e)


def page_attention(
    q: jax.Array,
    k_pages: jax.Array | PackedPages,
    v_pages: jax.Array | PackedPages,
    layer: jax.Array | int,
    page_lists: jax.Array,
    tokens: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """See `api.page_attention`."""
    return launch(role(q, k_pages, v_pages, layer, page_lists, tokens, scale=scale), "page_attention")


def role(q, k_pages, v_pages, layer, page_lists, tokens, *, scale: float) -> Role:
    """A block for each row, head and part of the list."""
    rows, q_heads, head_dim = q.shape
    layers, pages, kv_heads, page_size, _ = k_pages.shape
    lists, width = page_lists.shape[1:]
    heads = max(lists, kv_heads)
    group = q_heads // heads
    processors()
    _check(q.dtype, head_dim, page_size, group)
    pools, body, scratch = _over(k_pages, v_pages, head_dim)

    steps = -(-width // PAGES)
    each = max(PART_STEPS, -(-steps // MAX_PARTS))
    parts = -(-steps // each)
    grouped = jnp.pad(q.reshape(rows, heads, group, head_dim), ((0, 0), (0, 0), (0, ROWS - group), (0, 0)))
    queries = [grouped]
    if len(pools) > 2:
        columns = pools[0].shape[4]  # the channels whose codes lie in one nibble go together
        halves = grouped.reshape(*grouped.shape[:3], head_dim // columns, columns).swapaxes(2, 3)
        queries = [halves, grouped.astype(jnp.float32).sum(-1)]
    body = functools.partial(body, each=each, kv_heads=kv_heads, scale=scale * LOG2_E)
    args = (a.astype(jnp.int32) for a in (page_lists, tokens, jnp.reshape(layer, (1,))))
    of_heads = (a.reshape(layers, pages * kv_heads, page_size, -1) for a in pools[:2])
    words = (_listed(a, layer, page_lists, heads) for a in pools[2:])
    outputs = ((group, head_dim), (2, ROWS))
    return Role(
        grid=(rows, heads, parts),
        body=body,
        inputs=(*args, *queries, *of_heads, *words),
        outputs=tuple(jax.ShapeDtypeStruct((rows, heads, parts, *shape), jnp.float32) for shape in outputs),
        scratch=scratch,
        finish=lambda partial, statistics: _merge(partial, statistics[..., :group], q),
    )


def _over(k_pages, v_pages, head_dim):
    """The pools' arrays, the kernel over them and its scratch."""
    page_size = k_pages.shape[3]
    if isinstance(k_pages, PackedPages) and isinstance(v_pages, PackedPages):
        if k_pages.bits(head_dim) != v_pages.bits(head_dim):
            raise NotImplementedError("keys and values of different bits")
        pools = (k_pages.codes, v_pages.codes, k_pages.words, v_pages.words)
        return (
            pools,
            _mosaic_packed.attend_part,
            _mosaic_packed.scratch(page_size, head_dim, k_pages.shape[4]),
        )
    types = [jnp.dtype(getattr(p, "dtype", "uint8")).name for p in (k_pages, v_pages)]
    if types != ["bfloat16"] * 2:
        raise NotImplementedError(f"pools of {' and '.join(types)}; bfloat16, or both packed")
    return (k_pages, v_pages), _attend_part, _scratch(page_size, head_dim)


def _listed(words, layer, page_lists, heads):
    """Words [L, N, Hkv, page] in the order of the lists, which are filled up to whole steps: int32 [S, H, tokens]."""
    rows, _, width = page_lists.shape
    ids = jnp.broadcast_to(page_lists, (rows, heads, width))
    ids = jnp.pad(ids, ((0, 0), (0, 0), (0, -width % PAGES)))
    reads = jnp.arange(heads) // (heads // words.shape[2])
    return words[layer, ids, reads[:, None]].reshape(rows, heads, ids.shape[2] * words.shape[3])


def _check(dtype, head_dim, page_size, group):
    if jnp.dtype(dtype).name != "bfloat16":
        raise NotImplementedError(f"queries of {dtype}; bfloat16")
    if head_dim not in (64, 128) or page_size not in (16, 32):
        raise NotImplementedError(f"head dimension {head_dim}, page size {page_size}; 64 or 128, 16 or 32")
    if group > ROWS:
        raise NotImplementedError(f"{group} query heads to a KV head; at most {ROWS}")


def _scratch(page_size, head_dim):
    keys = PAGES * page_size
    stages = 3 if page_size == 16 else 2
    ring = plgpu.SMEM((stages, keys, head_dim), jnp.bfloat16, transforms=swizzled(head_dim))
    query = plgpu.SMEM((ROWS, head_dim), jnp.bfloat16, transforms=swizzled(head_dim))
    weights = plgpu.SMEM((ROWS, keys), jnp.bfloat16, transforms=swizzled(keys))
    arrived = plgpu.Barrier(num_arrivals=PAGES, num_barriers=stages)
    return {
        "k_ring": ring,
        "v_ring": ring,
        "tiles": plgpu.RefUnion(
            (query, weights),
            (plgpu.SMEM((ROWS, head_dim), jnp.float32), plgpu.SMEM((2, ROWS), jnp.float32)),
        ),
        "k_arrived": arrived,
        "v_arrived": arrived,
        "q_arrived": plgpu.Barrier(),
    }


def _attend_part(
    row, head, part, page_lists, tokens, layer, q, k_pages, v_pages, out, statistics,
    *, k_ring, v_ring, tiles, k_arrived, v_arrived, q_arrived, each, kv_heads, scale,
):  # fmt: skip
    (q_tile, p_tile), (out_tile, statistics_tile) = tiles
    _, lists, width = page_lists.shape
    mine, reads = head if lists > 1 else 0, head // max(lists // kv_heads, 1)
    stages, keys, head_dim = k_ring.shape
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
                plgpu.copy_gmem_to_smem(k_pages.at[layer[0], at], k_ring.at[slot, to], k_arrived.at[slot])
                plgpu.copy_gmem_to_smem(v_pages.at[layer[0], at], v_ring.at[slot, to], v_arrived.at[slot])

    plgpu.copy_gmem_to_smem(q.at[row, head], q_tile, q_arrived)
    for step in range(stages - 1):
        request(step)
    plgpu.barrier_wait(q_arrived)

    layout = plgpu.Layout
    left, right, total = (
        make(jnp.bfloat16, m_warps=1) for make in (layout.MMA_LHS, layout.MMA_RHS, layout.MMA_ACC)
    )
    queries = plgpu.load(q_tile, layout=left, optimized=False)

    def along_rows(vector, columns):
        return lax.broadcast_in_dim(vector, (ROWS, columns), (0,))

    def one_step(step, carry):
        top, summed, acc = carry
        slot = lax.rem(step, stages)
        plgpu.commit_smem()
        request(step + stages - 1)
        plgpu.barrier_wait(k_arrived.at[slot])
        k = plgpu.load(k_ring.at[slot].T, layout=right, optimized=False)
        scores = mma(plgpu.layout_cast(jnp.zeros((ROWS, keys), jnp.float32), total), queries, k) * scale
        held = length - (begin + step) * keys
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), 1, layout=total)
        scores = jnp.where(column < held, scores, LOWEST)
        new_top = jnp.maximum(top, scores.max(axis=1))
        keep = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - along_rows(new_top, keys))
        summed = summed * keep + weights.sum(axis=1)
        p_tile[...] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        weights = plgpu.load(p_tile, layout=left, optimized=False)
        plgpu.barrier_wait(v_arrived.at[slot])
        v = plgpu.load(v_ring.at[slot], layout=right, optimized=False)
        # What no token has written may be NaN, and NaN times a weight of 0 is NaN.
        token = plgpu.broadcasted_iota(jnp.int32, (keys, head_dim), 0, layout=right)
        v = jnp.where(token < held, v, jnp.zeros_like(v))
        return new_top, summed, mma(acc * along_rows(keep, head_dim), weights, v)

    def vector(value):
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), total.reduce(1))

    acc = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), total)
    top, summed, acc = lax.fori_loop(0, count, one_step, (vector(LOWEST), vector(0.0), acc))
    plgpu.commit_smem()
    out_tile[...] = acc
    statistics_tile[0, :] = top
    statistics_tile[1, :] = summed
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, out.shape[3])], out.at[row, head, part])
    plgpu.copy_smem_to_gmem(statistics_tile, statistics.at[row, head, part])
    plgpu.wait_smem_to_gmem(0)


def _merge(partial, statistics, q):
    """partial: [S, H, parts, G, D], statistics: [S, H, parts, 2, G] of powers of two -> as q."""
    top, summed = statistics[..., 0, :], statistics[..., 1, :]
    share = jnp.exp2(top - top.max(axis=2, keepdims=True))
    total = (summed * share).sum(axis=2)
    out = (partial * share[..., None]).sum(axis=2) / jnp.where(total > 0, total, 1)[..., None]
    return out.reshape(q.shape).astype(q.dtype)
