"""A plain matrix product as a team of two warpgroups, so that it can share a processor with other work.

A tile of the result has 128 rows and 256 columns (128 where they do not divide by 256), of which each warpgroup computes 64 rows:
so wgmma, which reads its right operand once for each warpgroup, asks shared memory for the fewest bytes. The ring goes on from
one tile to the next; its steps are short, and their swizzle of 64 bytes is that of both operands, as wgmma wants it.

Where rows of tiles come in pairs, two neighbouring blocks compute a pair: each copies half of its columns for both. A slot is
filled again when all four warpgroups have read it, and no block ends before its neighbour has read the last one.

Bytes asked of the second-level cache: x once for every 256 columns and w once for every 256 rows (128 without pairs); tiles that
are computed at the same time share their columns, so that memory is read about once. Flops: 2 K N for each row of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors, swizzled
from pallas_kernels._teams import Team

WARPGROUPS = 2
WGMMA_ROWS = 64
ROWS = WARPGROUPS * WGMMA_ROWS
COLUMNS = (256, 128)  # of a tile; the first that fits
DEPTH = 32  # channels of a step
WRITTEN = DEPTH  # columns that leave through shared memory at a time


def team(x: jax.Array, w: jax.Array, *, stages: int, written: int) -> Team:
    """x [M, K] by w [K, N] tile by tile; [M, N] in x's type.

    Args:
      stages: steps in the ring, 24 KiB each.
      written: parts of a tile that each warpgroup may be writing at a time, 4 KiB each.
    """
    processors()
    (rows, depth), columns = x.shape, w.shape[1]
    if not x.dtype == w.dtype == jnp.bfloat16:
        raise NotImplementedError(f"{x.dtype} by {w.dtype}; bfloat16")
    wide = tile_columns(columns)
    if depth % DEPTH or columns % wide:
        raise NotImplementedError(f"a matrix of {depth} by {columns}; multiples of {DEPTH} and {wide}")
    padded = jnp.pad(x, ((0, -rows % ROWS), (0, 0)))
    cluster = cluster_blocks(rows)
    return Team(
        warpgroups=WARPGROUPS,
        cluster=cluster,
        body=functools.partial(_tiles, stages=stages, written=written, wide=wide, cluster=cluster),
        inputs=(padded, w),
        outputs=(jax.ShapeDtypeStruct((padded.shape[0], columns), x.dtype),),
        scratch={
            "x_ring": _tiled((stages, ROWS, DEPTH)),
            "w_ring": _tiled((stages, DEPTH, wide)),
            "parts": _tiled((WARPGROUPS, written, WGMMA_ROWS, WRITTEN)),
            "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "left": _left(stages, cluster),
        },
        finish=lambda out: out[:rows],
    )


def tile_columns(columns: int) -> int:
    return next((wide for wide in COLUMNS if columns % wide == 0), COLUMNS[-1])


def cluster_blocks(rows: int) -> int:
    """Blocks that share the columns of their tiles: two where rows of tiles come in pairs."""
    return 2 if -(-rows // ROWS) % 2 == 0 else 1


def _left(stages, cluster):
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=WARPGROUPS, num_barriers=stages)


def _tiled(shape: tuple[int, ...]):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled(DEPTH))


def _tiles(
    group, first, every, x, w, out,
    *, x_ring, w_ring, parts, arrived, left, stages, written, wide, cluster,
):  # fmt: skip
    """The first warpgroup also asks for what both read."""
    high, steps = out.shape[0] // ROWS, x.shape[1] // DEPTH
    tiles = (high * (out.shape[1] // wide) - first + every - 1) // every
    mine = pl.ds(group * WGMMA_ROWS, WGMMA_ROWS)

    def request(step):
        """Copies the operands of a step, counted over all tiles, into its slot of the ring."""
        tile = first + lax.div(step, steps) * every

        @pl.when((group == 0) & (step < tiles * steps))
        def _():
            slot, deep = lax.rem(step, stages), pl.ds(lax.rem(step, steps) * DEPTH, DEPTH)
            columns = pl.ds(lax.div(tile, high) * wide, wide)
            rows = pl.ds(lax.rem(tile, high) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(x.at[rows, deep], x_ring.at[slot], arrived.at[slot])
            axes = "cluster" if cluster > 1 else None
            w_tile = w.at[deep, columns]
            plgpu.copy_gmem_to_smem(w_tile, w_ring.at[slot], arrived.at[slot], collective_axes=axes)

    def replace(step):
        """Gives the slot of a step that this warpgroup has read to the one that follows in it."""
        slot = lax.rem(step, stages)
        if cluster > 1:  # the warp that arrives for its warpgroup may be the first to have read the slot
            plgpu.commit_smem()
        plgpu.barrier_arrive(left.at[slot])

        @pl.when(group == 0)
        def _():
            plgpu.barrier_wait(left.at[slot])

        request(step + stages)

    for step in range(stages):
        request(jnp.int32(step))

    def one_tile(i, carry):
        begin = i * steps

        def multiply(total):
            def one_step(step, carry):
                slot = lax.rem(begin + step, stages)
                plgpu.barrier_wait(arrived.at[slot])
                plgpu.wgmma(total, x_ring.at[slot, mine], w_ring.at[slot])
                plgpu.wgmma_wait(1)  # that of the step before has read its slot
                pl.when(step > 0)(lambda: replace(begin + step - 1))
                return carry

            lax.fori_loop(0, steps, one_step, None)
            plgpu.wgmma_wait(0)
            replace(begin + steps - 1)
            return total[...]

        product = pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, wide), jnp.float32))
        tile = first + i * every
        rows = pl.ds((lax.rem(tile, high) * WARPGROUPS + group) * WGMMA_ROWS, WGMMA_ROWS)
        for number, at in enumerate(range(0, wide, WRITTEN)):
            part = parts.at[group, number % written]
            plgpu.wait_smem_to_gmem(written - 1, wait_read_only=True)
            part[...] = product[:, at : at + WRITTEN].astype(parts.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(part, out.at[rows, pl.ds(lax.div(tile, high) * wide + at, WRITTEN)])
        return carry

    lax.fori_loop(0, tiles, one_tile, None)
    plgpu.wait_smem_to_gmem(0)
