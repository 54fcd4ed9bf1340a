"""One block of int4_matmul on Hopper: 64 outputs of some rows over a part of the channels; see `mosaic_gpu`."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import gather, pl, plgpu, stage_types, wgmma_from_registers
from pallas_kernels.int4_matmul.matrix import BLOCK

OUTPUTS = 64  # of a block: the rows of a wgmma
OUT_COLUMNS = 32  # of a tile of the result in shared memory: 128 bytes
STAGES = 6
UNUSED = -1  # in place of a block's matrix: it ends at once


def _tiled(columns: int, size: int = 1) -> tuple:
    """How shared memory holds a matrix of numbers of `size` bytes for tensor cores and their results."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * size)  # type: ignore[abstract]


def scratch_types(tile: int, dtype, high: bool) -> dict:
    half, stages = BLOCK // 2, STAGES if dtype.itemsize == 1 else STAGES - 2
    scratch = {
        "w_ring": plgpu.SMEM((stages, OUTPUTS, half), jnp.int8, transforms=_tiled(half)),
        "x_ring": plgpu.SMEM((stages, tile, BLOCK), dtype, transforms=_tiled(half, dtype.itemsize)),
        "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "out_tile": plgpu.SMEM((OUTPUTS, tile), jnp.float32, transforms=_tiled(min(tile, OUT_COLUMNS), 4)),
        "stage": stage_types((OUTPUTS, half), dtype),
    }
    if high:
        scratch |= {
            "w_high": plgpu.SMEM((OUTPUTS, BLOCK), jnp.int8, transforms=_tiled(BLOCK)),
            "x_high": plgpu.SMEM((tile, BLOCK), jnp.int8, transforms=_tiled(BLOCK)),
            "high_arrived": plgpu.Barrier(num_arrivals=2),
        }
    return scratch


def block_of_outputs(column, block, part, experts, given, out, **rest):
    expert = experts[block]

    @pl.when(expert != UNUSED)
    def _():
        _compute(column, block, part, expert, given, out, **rest)


def _compute(
    column, block, part, expert, given, out, *,
    w_ring, x_ring, arrived, out_tile, stage, w_high=None, x_high=None, high_arrived=None,
    groups, each, scale_rows, pair,
):  # fmt: skip
    stages, tile, half = x_ring.shape[0], x_ring.shape[1], BLOCK // 2
    floats, two_level, high = "biased" not in given, "channel" in given, "w_high" in given
    per_group = not floats and given["x_scale"].shape[0] > 1
    outputs, rows = pl.ds(column * OUTPUTS, OUTPUTS), pl.ds(block * tile, tile)
    begin = part * each
    count = jnp.clip(groups - begin, 0, each)
    layout = plgpu.Layout.WGMMA

    def request(step):
        @pl.when(step < count)
        def _():
            slot, group = lax.rem(step, stages), begin + step
            packed, codes = pl.ds(group * half, half), pl.ds(group * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(given["w"].at[expert, outputs, packed], w_ring.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(given["x"].at[rows, codes], x_ring.at[slot], arrived.at[slot])

    def down(vector):
        """[64], the same for all rows of activations."""
        return lax.broadcast_in_dim(vector, (OUTPUTS, tile), (0,))

    def of_outputs(vector):
        return down(plgpu.load(vector, layout=layout.reduce(1), optimized=False))

    def of_rows(vector):
        return lax.broadcast_in_dim(
            plgpu.load(vector, layout=layout.reduce(0), optimized=False), (OUTPUTS, tile), (1,)
        )

    output = plgpu.broadcasted_iota(jnp.int32, (OUTPUTS,), 0, layout=layout.reduce(1)) + column * OUTPUTS
    # Where an output's scales begin: they are read as they are stored, one for each `pair` outputs and group.
    scales_at = (expert * scale_rows + output // pair) * groups

    def scale_of(group):
        own = gather(given["scale"], scales_at + group, layout.reduce(1))
        return down(own.astype(jnp.int32) if two_level else own)

    if high:
        here = part == 0

        @pl.when(here)
        def _():
            plgpu.copy_gmem_to_smem(given["w_high"].at[expert, outputs], w_high, high_arrived)
            plgpu.copy_gmem_to_smem(given["x_high"].at[rows], x_high, high_arrived)

    for step in range(stages - 1):
        request(step)

    def halves(slot):
        """The activations of both halves of a group."""
        return [x_ring.at[slot, :, pl.ds(begin, half)].T for begin in (0, half)]

    def multiply(slot):
        """The integer sums of one group: int32 [64, tile]."""
        codes = w_ring[slot]

        def go(low, upper):
            x_low, x_upper = halves(slot)
            wgmma_from_registers(low, codes & 15, x_low, stage)
            wgmma_from_registers(upper, codes & -16, x_upper, stage)
            plgpu.wgmma_wait(0)
            return low[...], upper[...]

        sums = plgpu.ACC((OUTPUTS, tile), jnp.int32)
        low, upper = pl.run_scoped(go, sums, sums)
        return low + (upper >> 4)

    def multiply_floats(slot):
        """The same of floats: codes are small integers, which bfloat16 holds exactly."""
        codes = plgpu.load(w_ring.at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X)

        def opened(part):
            return plgpu.layout_cast(part, layout).astype(x_ring.dtype)

        def go(sums):
            x_low, x_upper = halves(slot)
            wgmma_from_registers(sums, opened(codes & 15) - 8, x_low, stage)
            plgpu.wgmma_wait(0)
            wgmma_from_registers(sums, opened(codes & -16) * 0.0625, x_upper, stage)
            plgpu.wgmma_wait(0)
            return sums[...]

        return pl.run_scoped(go, plgpu.ACC((OUTPUTS, tile), jnp.float32))

    def one_group(step, total):
        slot, group = lax.rem(step, stages), begin + step
        factor = scale_of(group)
        too_much = None if floats else of_rows(given["biased"].at[group, rows])
        plgpu.barrier_wait(arrived.at[slot])
        sums = multiply_floats(slot) if floats else multiply(slot) - too_much
        plgpu.commit_smem()
        request(step + stages - 1)
        if two_level:
            return total + sums * factor
        if per_group:
            factor = factor * of_rows(given["x_scale"].at[group, rows])
        return total + sums.astype(jnp.float32) * factor

    kind = jnp.int32 if two_level else jnp.float32
    total = plgpu.layout_cast(jnp.zeros((OUTPUTS, tile), kind), layout)
    total = lax.fori_loop(0, count, one_group, total).astype(jnp.float32)
    if not (floats or per_group):
        factor = of_rows(given["x_scale"].at[0, rows])
        if two_level:
            factor = of_outputs(given["channel"].at[expert, outputs]) * factor
        total = total * factor
    if high:

        def add_high(total):
            plgpu.barrier_wait(high_arrived)

            def go(sums):
                plgpu.wgmma(sums, w_high, x_high.T)
                plgpu.wgmma_wait(0)
                return sums[...]

            sums = pl.run_scoped(go, plgpu.ACC((OUTPUTS, tile), jnp.int32)).astype(jnp.float32)
            factor = of_outputs(given["w_high_scale"].at[expert, outputs])
            return total + sums * (factor * of_rows(given["x_high_scale"].at[0, rows]))

        total = lax.cond(here, add_high, lambda total: total, total)
    out_tile[...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, out.at[part, outputs, rows])
    plgpu.wait_smem_to_gmem(0)
