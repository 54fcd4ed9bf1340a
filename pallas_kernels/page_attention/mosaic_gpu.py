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

from pallas_kernels._mosaic import processors
from pallas_kernels._roles import Role, launch, numbered
from pallas_kernels._teams import Team
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.page_attention import _mosaic_packed, _mosaic_plain
from pallas_kernels.page_attention._mosaic_packed import PAGES, ROWS

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


def team(q, k_pages, v_pages, layer, page_lists, tokens, *, scale: float) -> Team:
    """The blocks of `role` as the queue of one warpgroup."""
    blocks = role(q, k_pages, v_pages, layer, page_lists, tokens, scale=scale)
    body, scratch = functools.partial(_one_by_one, blocks), blocks.scratch
    if not isinstance(k_pages, PackedPages):
        assert isinstance(blocks.body, functools.partial)
        body = functools.partial(_mosaic_plain.attend_queue, **blocks.body.keywords)
        scratch = _mosaic_plain.queue_scratch(k_pages.shape[3], k_pages.shape[4])
    return Team(
        warpgroups=1,
        body=lambda _, *args, **scratch: body(*args, **scratch),
        inputs=blocks.inputs,
        outputs=blocks.outputs,
        scratch=scratch,
        finish=blocks.finish,
    )


def _one_by_one(blocks: Role, first, every, *refs, **scratch):
    def one(i, carry):
        blocks.body(*numbered(blocks.grid, first + i * every), *refs, **scratch)
        return carry

    lax.fori_loop(0, (blocks.blocks - first + every - 1) // every, one, None)


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
    return (k_pages, v_pages), _mosaic_plain.attend_part, _mosaic_plain.scratch(page_size, head_dim)


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


def _merge(partial, statistics, q):
    """partial: [S, H, parts, G, D], statistics: [S, H, parts, 2, G] of powers of two -> as q."""
    top, summed = statistics[..., 0, :], statistics[..., 1, :]
    share = jnp.exp2(top - top.max(axis=2, keepdims=True))
    total = (summed * share).sum(axis=2)
    out = (partial * share[..., None]).sum(axis=2) / jnp.where(total > 0, total, 1)[..., None]
    return out.reshape(q.shape).astype(q.dtype)
