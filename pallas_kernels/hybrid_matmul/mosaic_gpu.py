"""hybrid_matmul for Hopper: blocks of a matrix product, bound by compute, and of page_attention, bound by memory, in one grid.

A block of a plain product has 128 rows and columns, one of a packed product is one of int4_matmul, and one of attention is one
of page_attention: so each result is that of a kernel of its own, bit for bit, and shared memory and registers are those of
the larger role, at most 107 KiB with pages of 16, which leaves room for two blocks on a processor, one of each kind.
Bytes and flops: those of the two kernels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._roles import Role, launch, launch_together
from pallas_kernels.hybrid_matmul import _product as plain
from pallas_kernels.int4_matmul import PackedMatrix
from pallas_kernels.int4_matmul import mosaic_gpu as packed
from pallas_kernels.page_attention import mosaic_gpu as decode


def hybrid_matmul(
    x, w, q, k_pages, v_pages, layer, page_lists, tokens, *, scale, pace
) -> tuple[jax.Array, jax.Array]:
    """See `api.hybrid_matmul`."""
    first = product(x, w)
    second = decode.role(q, k_pages, v_pages, layer, page_lists, tokens, scale=scale)
    if first.blocks and second.blocks:
        out, attended = launch_together(first, second, first.blocks, "hybrid_matmul", pace)
        return out.astype(q.dtype), attended
    columns = w.outputs if isinstance(w, PackedMatrix) else w.shape[1]
    out = launch(first, "hybrid_matmul") if first.blocks else jnp.zeros((0, columns))
    return out.astype(q.dtype), launch(second, "hybrid_matmul") if second.blocks else q


def product(x, w) -> Role:
    """x @ w as the blocks of a launch."""
    return packed.role(x, w) if isinstance(w, PackedMatrix) else plain.role(x, w)
