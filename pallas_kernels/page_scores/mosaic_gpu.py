"""page_scores for Hopper: the bound is one matmul of both bounds with the negative and the positive part of q.

A block scores 64 pages of one row and KV head for all its query heads. Pages lie anywhere, so their rows of bounds
come by one TMA each; five blocks share a processor and keep their copies in flight.

Bytes: 4 * D per page and KV head for bfloat16 bounds, each once, which is the floor (metadata of the reference
formula); beside it 4 * G per page of scores written and 4 of page ids: 4 % with D 128 and G 4. Bounds in eight bits take
2 * D; their scales, gathered before, 12 more: 13 % beside them in all.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors, stage_types, swizzled, wgmma_from_registers
from pallas_kernels.page_bounds import Bounds, ScaledBounds
from pallas_kernels.page_scores.xla import factors

# Rows of the tensor core's tile; columns come in eights.
PAGES, COLUMNS = 64, 8
WARPS = 4


def page_scores(
    q: jax.Array,
    bounds: Bounds,
    layer: jax.Array | int,
    page_table: jax.Array,
    kv_len: jax.Array,
    *,
    page_size: int,
    spread: float,
) -> jax.Array:
    """See `api.page_scores`."""
    rows, q_heads, head_dim = q.shape
    layers, pages, kv_heads = bounds.shape[:3]
    group, width = q_heads // kv_heads, page_table.shape[1]
    processors()
    if q.dtype != jnp.bfloat16 or bounds.dtype not in (jnp.bfloat16, jnp.int8):
        raise NotImplementedError(
            f"queries of {q.dtype}, bounds of {bounds.dtype}; bfloat16, and bfloat16 or int8"
        )
    if head_dim not in (64, 128):
        raise NotImplementedError(f"head dimension {head_dim}; 64 or 128")

    columns = -(-group // COLUMNS) * COLUMNS
    signed = jnp.stack(factors(q.astype(jnp.float32), spread), axis=2).astype(jnp.bfloat16)
    signed = signed.reshape(rows, kv_heads, group, 2, head_dim).swapaxes(2, 3)
    signed = jnp.pad(signed, ((0, 0), (0, 0), (0, 0), (0, columns - group), (0, 0)))
    blocks = -(-width // PAGES)
    kernel = plgpu.kernel(
        functools.partial(_score_block, group=group, page_size=page_size),
        out_type=jax.ShapeDtypeStruct((rows, q_heads, blocks * PAGES), jnp.float32),
        grid=(rows, kv_heads, blocks),
        grid_names=("row", "head", "block"),
        kernel_name="page_scores",
        scratch_types={
            "tile": plgpu.SMEM((PAGES, 2, head_dim), bounds.dtype),
            "queries": plgpu.SMEM((2, columns, head_dim), jnp.bfloat16, transforms=swizzled(head_dim)),
            "arrived": plgpu.Barrier(num_arrivals=PAGES + 1),
            "stage": stage_types((PAGES, head_dim), jnp.bfloat16),
        },
    )
    of_rows = [a.astype(jnp.int32) for a in (page_table, kv_len, jnp.reshape(layer, (1,)))]
    if isinstance(bounds, ScaledBounds):
        scales = bounds.scales[layer, page_table].swapaxes(1, 2)
        of_rows.append(jnp.pad(scales, ((0, 0), (0, 0), (0, blocks * PAGES - width))))
        values = bounds.values
    else:
        values = bounds
    of_heads = values.reshape(layers, pages * kv_heads, 2, head_dim)
    return kernel(*of_rows, signed, of_heads)[..., :width]


def _score_block(table, kv_len, layer, *others, tile, queries, arrived, stage, group, page_size):
    *scales, signed, bounds, out = others
    row, head, block = (lax.axis_index(name) for name in ("row", "head", "block"))
    first, kv_heads = block * PAGES, signed.shape[1]
    columns = queries.shape[1]

    @pl.when(first * page_size < kv_len[row])
    def _():
        plgpu.copy_gmem_to_smem(signed.at[row, head], queries, arrived)

        @plgpu.warp_map
        def _(warp):
            for i in range(PAGES // WARPS):
                page = warp * (PAGES // WARPS) + i
                page_id = table[row, jnp.minimum(first + page, table.shape[1] - 1)]
                source = bounds.at[layer[0], page_id * kv_heads + head]
                plgpu.copy_gmem_to_smem(source, tile.at[page], arrived)

        plgpu.barrier_wait(arrived)

        def multiply(total):
            for bound in range(2):
                values = plgpu.load(tile.at[:, bound], layout=plgpu.Layout.WGMMA, optimized=False)
                wgmma_from_registers(total, values.astype(jnp.bfloat16), queries.at[bound].T, stage)
            return total[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((PAGES, columns), jnp.float32))
        column = plgpu.broadcasted_iota(jnp.int32, (PAGES, columns), 1, layout=plgpu.Layout.WGMMA)
        for g in range(group):
            mine = jnp.where(column == g, scores, 0).sum(axis=1)
            for of_pages in scales:
                layout = plgpu.Layout.WGMMA.reduce(1)
                here = of_pages.at[row, head, pl.ds(first, PAGES)]
                mine = mine * plgpu.load(here, layout=layout, optimized=False)
            out[row, head * group + g, pl.ds(first, PAGES)] = mine
