"""A plain matrix product as the blocks of one warpgroup, so that it can share a launch and a processor with other work."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors, swizzled
from pallas_kernels._roles import Role

WGMMA_ROWS = 64
HALVES = 2  # of a block's rows, an accumulator each
ROWS = HALVES * WGMMA_ROWS
COLUMNS = 128
DEPTH = 64  # channels of a step
STAGES = 3  # 96 KiB, so that a processor holds two blocks


def role(x: jax.Array, w: jax.Array) -> Role:
    """A block for each 128 rows of x [M, K] and 128 columns of w [K, N]; [M, N] in x's type.

    Bytes: w once for every 128 rows and x once for every 128 columns, mostly from the second-level cache: blocks that run
    beside one another share their columns. Flops: 2 K N for each row of a block.
    """
    processors()
    (rows, depth), columns = x.shape, w.shape[1]
    if not x.dtype == w.dtype == jnp.bfloat16:
        raise NotImplementedError(f"{x.dtype} by {w.dtype}; bfloat16")
    if depth % DEPTH or columns % COLUMNS:
        raise NotImplementedError(f"a matrix of {depth} by {columns}; multiples of {DEPTH} and {COLUMNS}")
    padded = jnp.pad(x, ((0, -rows % ROWS), (0, 0)))
    return Role(
        grid=(columns // COLUMNS, padded.shape[0] // ROWS),
        body=functools.partial(_block, steps=depth // DEPTH),
        inputs=(padded, w),
        outputs=(jax.ShapeDtypeStruct((padded.shape[0], columns), x.dtype),),
        scratch={
            "rings": plgpu.RefUnion(
                (
                    _tiled((STAGES, HALVES, WGMMA_ROWS, DEPTH)),
                    _tiled((STAGES, DEPTH, COLUMNS)),
                ),
                (_tiled((HALVES, WGMMA_ROWS, COLUMNS)),),
            ),
            "arrived": plgpu.Barrier(num_arrivals=HALVES + 1, num_barriers=STAGES),
        },
        finish=lambda out: out[:rows],
    )


def _tiled(shape: tuple[int, ...]):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled(shape[-1]))


def _block(column, block, x, w, out, *, rings, arrived, steps):
    (x_ring, w_ring), (tile,) = rings
    columns = pl.ds(column * COLUMNS, COLUMNS)
    rows = [pl.ds((block * HALVES + half) * WGMMA_ROWS, WGMMA_ROWS) for half in range(HALVES)]

    def request(step):
        @pl.when(step < steps)
        def _():
            slot, deep = lax.rem(step, STAGES), pl.ds(step * DEPTH, DEPTH)
            for half in range(HALVES):
                plgpu.copy_gmem_to_smem(x.at[rows[half], deep], x_ring.at[slot, half], arrived.at[slot])
            plgpu.copy_gmem_to_smem(w.at[deep, columns], w_ring.at[slot], arrived.at[slot])

    for step in range(STAGES - 1):
        request(jnp.int32(step))

    def multiply(*sums):
        def one_step(step, carry):
            slot = lax.rem(step, STAGES)
            plgpu.barrier_wait(arrived.at[slot])
            for half in range(HALVES):
                plgpu.wgmma(sums[half], x_ring.at[slot, half], w_ring.at[slot])
            plgpu.wgmma_wait(HALVES)  # those of the step before have read their slot
            plgpu.commit_smem()
            request(step + STAGES - 1)
            return carry

        lax.fori_loop(0, steps, one_step, None)
        plgpu.wgmma_wait(0)
        return tuple(one[...] for one in sums)

    accumulator = plgpu.ACC((WGMMA_ROWS, COLUMNS), jnp.float32)
    products = pl.run_scoped(multiply, *(accumulator,) * HALVES)
    plgpu.commit_smem()  # every warp has read the last slot
    for half in range(HALVES):
        tile[half] = products[half].astype(tile.dtype)
    plgpu.commit_smem()
    for half in range(HALVES):
        plgpu.copy_smem_to_gmem(tile.at[half], out.at[rows[half], columns])
    plgpu.wait_smem_to_gmem(0)
