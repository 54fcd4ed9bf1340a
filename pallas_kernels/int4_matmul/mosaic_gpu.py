"""int4_matmul for Hopper: packed weights come by TMA, are opened in registers, and are the left operand of wgmma s8.

A block computes 64 outputs of up to 64 rows over a part of the channels. A byte of 128 channels' block holds two codes
(`matrix.pack`): `byte & 15` and `byte & -16` are 8-bit integers as they are, so opening costs one instruction for four codes,
and the two sums, one eight too large for each of its activations and one sixteen times too large, are mended as integers.
Two-level scales stay integers up to the end: one multiply-add a group and sum. Where a sum is split does not depend on the
number of rows, so neither does the result.

Activations of 16 bits take the codes as bfloat16, and each group's float sum its scale.

Bytes, against the floor of reading packed weights and scales once: both are read as they are stored, a scale of two
outputs by both (the eight groups of a sector one after another, from the first-level cache); activations come once for
each 64 outputs, mostly from the second-level cache; parts write and read 8 * M * N * parts bytes, M at least 8.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import gather, pl, plgpu, processors, stage_types, wgmma_from_registers
from pallas_kernels.int4_matmul.matrix import BLOCK, PackedMatrix
from pallas_kernels.quantize.rows import QuantizedRows

OUTPUTS = 64  # of a block: the rows of a wgmma
ROWS = (8, 16, 32, 64)  # of a block
OUT_COLUMNS = 32  # of a tile of the result in shared memory: 128 bytes
STAGES = 6
# Blocks that fill the machine; below, the channels are split.
BLOCKS_PER_PROCESSOR = 2
FEWEST_GROUPS = 4  # of a part


def int4_matmul(x: QuantizedRows, w: PackedMatrix, group_sizes: jax.Array | None = None) -> jax.Array:
    """See `api.int4_matmul`."""
    _check(x, w)
    if group_sizes is None:
        rows = x.tokens
        tile = next((size for size in ROWS if size >= rows), ROWS[-1])
        padded = jax.tree.map(lambda a: jnp.pad(a, ((0, -rows % tile), (0, 0))), x)
        matrices = jax.tree.map(lambda a: a[None], w)
        blocks = jnp.zeros(-(-rows // tile), jnp.int32)
        return _blocks(padded, matrices, blocks, tile)[:rows]
    return _grouped(x, w, group_sizes)


def _grouped(x: QuantizedRows, w: PackedMatrix, group_sizes: jax.Array) -> jax.Array:
    """Rows are moved so that every block of rows meets one matrix."""
    rows, experts = x.tokens, group_sizes.shape[0]
    tile = next((size for size in ROWS if size * experts >= rows), ROWS[-1])
    count = rows // tile + experts  # as many as can be
    ends, block_ends = jnp.cumsum(group_sizes), jnp.cumsum(-(-group_sizes // tile))
    of_row = jnp.searchsorted(ends, jnp.arange(rows), side="right")  # experts: no matrix
    mine = jnp.minimum(of_row, experts - 1)
    first = jnp.where(mine > 0, block_ends[mine - 1], 0) * tile
    place = first + jnp.arange(rows) - (ends[mine] - group_sizes[mine])
    place = jnp.where(of_row < experts, place, count * tile)
    padded = jax.tree.map(
        lambda a: jnp.zeros((count * tile, a.shape[1]), a.dtype).at[place].set(a, mode="drop"), x
    )
    blocks = jnp.minimum(jnp.searchsorted(block_ends, jnp.arange(count), side="right"), experts - 1)
    out = _blocks(padded, w, blocks.astype(jnp.int32), tile)
    return out.at[place].get(mode="fill", fill_value=0)


def _check(x: QuantizedRows, w: PackedMatrix) -> None:
    processors()
    if w.low is None or x.low is None or w.group != BLOCK:
        raise NotImplementedError(f"groups of {'no' if w.low is None else w.group} channels; {BLOCK}")
    if x.low.dtype not in (jnp.int8, jnp.bfloat16) or (x.high is not None and x.high.dtype != jnp.int8):
        raise NotImplementedError(f"activations of {x.low.dtype}; int8, or bfloat16 without outlier channels")
    if w.high is not None and (w.high.shape[-1] != BLOCK or w.high.dtype != jnp.int8):
        raise NotImplementedError(
            f"{w.high.shape[-1]} outlier channels of {w.high.dtype}; {BLOCK} of int8, or none"
        )
    if w.outputs % OUTPUTS:
        raise NotImplementedError(f"{w.outputs} outputs; a multiple of {OUTPUTS}")


def _blocks(x: QuantizedRows, w: PackedMatrix, experts: jax.Array, tile: int) -> jax.Array:
    """x: rows of whole blocks; w with an axis E in front; experts: int32, the matrix of each block of rows."""
    assert x.low is not None and w.low is not None and w.scale is not None
    rows, groups = x.low.shape[0], w.groups
    parts = _parts(w.outputs // OUTPUTS * len(experts), groups)
    given = {"x": x.low, "w": lax.bitcast_convert_type(w.low, jnp.int8), "scale": w.scale.reshape(-1)}
    if x.low_scale is not None:
        # What the biased half of the codes adds, by row and group.
        halves = x.low.reshape(rows, groups, 2, BLOCK // 2)
        given |= {"biased": 8 * halves[:, :, 0].astype(jnp.int32).sum(-1).T, "x_scale": x.low_scale.T}
    if w.channel is not None:
        given["channel"] = w.channel
    if w.high is not None:
        assert x.high is not None and x.high_scale is not None
        given |= {
            "x_high_scale": x.high_scale.T,
            "w_high_scale": w.high_scale,
            "x_high": x.high,
            "w_high": w.high,
        }
    scale_rows = w.scale.shape[1]
    body = functools.partial(
        _block, groups=groups, each=-(-groups // parts), scale_rows=scale_rows, pair=w.outputs // scale_rows
    )
    kernel = plgpu.kernel(
        lambda experts, *refs, **scratch: body(experts, dict(zip(given, refs)), refs[-1], **scratch),
        out_type=jax.ShapeDtypeStruct((parts, w.outputs, rows), jnp.float32),
        grid=(w.outputs // OUTPUTS, len(experts), parts),
        grid_names=("outputs", "rows", "part"),
        kernel_name="int4_matmul",
        scratch_types=_scratch(tile, x.low.dtype, w.high is not None),
    )
    return kernel(experts, *given.values()).sum(0).T


def _parts(blocks: int, groups: int) -> int:
    wanted = -(-BLOCKS_PER_PROCESSOR * processors() // blocks)
    return max(1, min(wanted, groups // FEWEST_GROUPS))


def _tiled(columns: int, size: int = 1) -> tuple:
    """How shared memory holds a matrix of numbers of `size` bytes for tensor cores and their results."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * size)  # type: ignore[abstract]


def _scratch(tile: int, dtype, high: bool) -> dict:
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


def _block(
    experts, given, out, *,
    w_ring, x_ring, arrived, out_tile, stage, w_high=None, x_high=None, high_arrived=None,
    groups, each, scale_rows, pair,
):  # fmt: skip
    stages, tile, half = x_ring.shape[0], x_ring.shape[1], BLOCK // 2
    floats, two_level, high = "biased" not in given, "channel" in given, "w_high" in given
    per_group = not floats and given["x_scale"].shape[0] > 1
    column, block, part = (lax.axis_index(name) for name in ("outputs", "rows", "part"))
    expert = experts[block]
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
