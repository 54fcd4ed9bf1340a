"""hybrid_attention for Hopper: blocks of ragged_attention, bound by compute, and of page_attention, bound by memory, in one grid.

What a block does is what it does in the kernel of its own, so the result is the same bit for bit (`launch_together`). A prefill
block of a long context is as long as many decode blocks, so while one place of a processor holds it and keeps the tensor cores
busy, many lists of pages pass through the other.

Shared memory and registers are those of the larger role: with D 128 and pages of 16, 107 KiB and at most 255, that is two
blocks to a processor; with pages of 32 decoding takes 139 KiB, and a processor holds one. Packed pools take 84 KiB with 4 bits
(95 with pages of 32) and 100 KiB with 8 (143 with pages of 32, and a processor holds one block), and up to 255 registers, none
spilled. The limits are those of both kernels: 4 bits want head dimension 128.
Bytes and flops: those of the two kernels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._roles import launch_together
from pallas_kernels.hybrid_attention.xla import merge
from pallas_kernels.page_attention import mosaic_gpu as decode
from pallas_kernels.ragged_attention import mosaic_gpu as prefill
from pallas_kernels.ragged_attention._query_tiles import END


def hybrid_attention(
    q, k_pages, v_pages, layer, page_table, query_start, query_len, kv_len, single, page_lists, tokens,
    *, scale, window, pace,
) -> jax.Array:  # fmt: skip
    """See `api.hybrid_attention`."""
    others = jnp.where(single, 0, query_len)
    pools = (k_pages, v_pages, layer)
    roles = (
        prefill.role(q, *pools, page_table, query_start, others, kv_len, scale=scale, window=window),
        decode.role(q[query_start], *pools, page_lists, tokens, scale=scale),
    )
    tiles, heads = roles[0].inputs[0], roles[0].grid[1]
    live = heads * jnp.sum(tiles[:, END] > 0, dtype=jnp.int32)
    out, singles = launch_together(*roles, live, "hybrid_attention", pace)
    return merge(out, singles, query_start, single)
