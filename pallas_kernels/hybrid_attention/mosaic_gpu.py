"""hybrid_attention for Hopper: blocks of ragged_attention, bound by compute, and of page_attention, bound by memory, in one grid.

A block's role follows from its index, and what a block does is what it does in the kernel of its own, so the result is the same
bit for bit. A period of the index has as many prefill blocks as the device has processors, then decode blocks, so many that both
kinds last to the last period. A processor holds two blocks and begins with one of each kind; whichever ends makes room for
the next index. A prefill block of a long context is as long as many decode blocks, so while one place of a processor holds
it and keeps the tensor cores busy, many lists of pages pass through the other.

Shared memory and registers are those of the larger role: with D 128 and pages of 16, 107 KiB and at most 255, that is two
blocks to a processor; with pages of 32 decoding takes 139 KiB, and a processor holds one.
Bytes and flops: those of the two kernels.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors
from pallas_kernels._roles import Role
from pallas_kernels.hybrid_attention.xla import merge
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.page_attention import mosaic_gpu as decode
from pallas_kernels.ragged_attention import mosaic_gpu as prefill
from pallas_kernels.ragged_attention._query_tiles import END


def hybrid_attention(
    q, k_pages, v_pages, layer, page_table, query_start, query_len, kv_len, single, page_lists, tokens,
    *, scale, window, pace,
) -> jax.Array:  # fmt: skip
    """See `api.hybrid_attention`."""
    if pace < 1:
        raise ValueError(f"hybrid_attention: pace {pace}; 1 or more")
    if isinstance(k_pages, PackedPages) or isinstance(v_pages, PackedPages):
        raise NotImplementedError(
            "packed pools, for which both roles together have too few registers; bfloat16"
        )
    others = jnp.where(single, 0, query_len)
    pools = (k_pages, v_pages, layer)
    roles = (
        prefill.role(q, *pools, page_table, query_start, others, kv_len, scale=scale, window=window),
        decode.role(q[query_start], *pools, page_lists, tokens, scale=scale),
    )
    tiles, heads = roles[0].inputs[0], roles[0].grid[1]
    live = heads * jnp.sum(tiles[:, END] > 0, dtype=jnp.int32)
    out, singles = _launch(*roles, live[None], group=processors(), pace=pace)
    return merge(out, singles, query_start, single)


def _launch(
    first: Role, second: Role, live: jax.Array, *, group: int, pace: float
) -> tuple[jax.Array, jax.Array]:
    """Results of both roles; `live`: int32 [1], how many blocks of the first have work; `group`: of its blocks in a period."""
    most = math.prod(first.grid)
    share = math.ceil(math.prod(second.grid) * pace)
    # Periods and their lengths follow from `live`; there are never more blocks than these.
    blocks = max(1, -(-most // group)) * (group + 1) + share
    references = len(first.inputs), len(second.inputs), len(first.outputs), len(second.outputs)

    def body(live, *refs):
        rest = iter(refs)
        inputs, more_inputs, outputs, more_outputs = (list(itertools.islice(rest, n)) for n in references)
        block = lax.axis_index("block")
        periods = jnp.maximum((live[0] + group - 1) // group, 1)
        each = (share + periods - 1) // periods
        period, place = block // (group + each), lax.rem(block, group + each)
        one, other = period * group + place, period * each + place - group
        is_first = (place < group) & (one < live[0])
        is_second = (place >= group) & (other < math.prod(second.grid))
        pl.when(is_first)(lambda: _run(first, one, inputs + outputs))
        pl.when(is_second)(lambda: _run(second, other, more_inputs + more_outputs))

    kernel = plgpu.kernel(
        body,
        out_type=(*first.outputs, *second.outputs),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="hybrid_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    out = kernel(live, *first.inputs, *second.inputs)
    return first.finish(*out[: len(first.outputs)]), second.finish(*out[len(first.outputs) :])


def _run(role: Role, number: jax.Array, references: list) -> None:
    """The block of that number; its scratch lives no longer, so the roles share the memory."""
    index: list[jax.Array] = []
    for size in reversed(role.grid):
        index.insert(0, lax.rem(number, size))
        number = number // size
    pl.run_scoped(functools.partial(role.body, *index, *references), **role.scratch)
