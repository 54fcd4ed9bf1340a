"""hybrid_matmul for Hopper: a matrix product, bound by compute, and page_attention, bound by memory, in one launch.

Plain: one block to a processor, in which two warpgroups multiply tiles of 128 by 256 and one attends to the parts of
page_attention, each from a queue of its own, so that both go on at their own pace. Shared memory is that of both, 223 KiB with
heads of 128 channels: with pages of 16 tokens a ring of 96 KiB and 16 KiB on their way out for the product, a ring of 96 KiB
and 13 for attention; with pages of 32 tokens 72 and 8, 128 and 13. Over packed pages 175 KiB at most.

Packed: blocks of int4_matmul and of page_attention in one grid, two to a processor, one of each kind; 104 KiB at most.

So each result is that of a kernel of its own, bit for bit. Bytes and flops: those of the two kernels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._roles import Role, launch, launch_together
from pallas_kernels._teams import Team, launch_teams
from pallas_kernels.hybrid_matmul import _product as plain
from pallas_kernels.int4_matmul import PackedMatrix
from pallas_kernels.int4_matmul import mosaic_gpu as packed
from pallas_kernels.page_attention import mosaic_gpu as decode

# Of the product, by page size: steps in the ring, parts of a tile on their way out. Attention takes what is left.
ROOM = {16: (4, 2), 32: (3, 1)}


def hybrid_matmul(
    x, w, q, k_pages, v_pages, layer, page_lists, tokens, *, scale, pace
) -> tuple[jax.Array, jax.Array]:
    """See `api.hybrid_matmul`."""
    attention = q, k_pages, v_pages, layer, page_lists, tokens
    blocks = decode.role(*attention, scale=scale)
    if isinstance(w, PackedMatrix):
        out, attended = _packed(packed.role(x, w), blocks, w.outputs, q, pace)
    else:
        out, attended = _plain(product(x, w, k_pages.shape[3]), blocks, attention, scale)
    return out.astype(q.dtype), attended


def product(x, w, page_size: int) -> Team:
    """x @ w beside attention to pages of so many tokens."""
    stages, written = ROOM[page_size]
    return plain.team(x, w, stages=stages, written=written)


def _plain(first: Team, blocks: Role, attention, scale):
    multiplies = first.outputs[0].size
    if multiplies and blocks.blocks:
        return launch_teams((first, decode.team(*attention, scale=scale)), "hybrid_matmul")
    out = launch_teams((first,), "hybrid_matmul")[0] if multiplies else jnp.zeros(first.outputs[0].shape)
    return out, launch(blocks, "hybrid_matmul") if blocks.blocks else attention[0]


def _packed(first: Role, blocks: Role, columns, q, pace):
    if first.blocks and blocks.blocks:
        return launch_together(first, blocks, first.blocks, "hybrid_matmul", pace)
    out = launch(first, "hybrid_matmul") if first.blocks else jnp.zeros((0, columns))
    return out, launch(blocks, "hybrid_matmul") if blocks.blocks else q
