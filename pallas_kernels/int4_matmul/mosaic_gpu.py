"""int4_matmul for Hopper: packed weights come by TMA, are opened in registers, and are the left operand of wgmma s8.

A block computes 64 outputs of up to 64 rows over a part of the channels. A byte of 128 channels' block holds two codes
(`matrix.pack`): `byte & 15` and `byte & -16` are 8-bit integers as they are, so opening costs one instruction for four codes,
and the two sums, one eight too large for each of its activations and one sixteen times too large, are mended as integers.
Two-level scales stay integers up to the end: one multiply-add a group and sum. Where a sum is split does not depend on the
number of rows, so neither does the result.

Bytes, against the floor of reading packed weights and scales once: activations come once for each 64 outputs, mostly from
the second-level cache; float scales of two rows are spread to one each, 2 bytes more for 64; parts write and read
8 * M * N * parts bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors, stage_types, wgmma_from_registers
from pallas_kernels.int4_matmul.matrix import BLOCK, PackedMatrix
from pallas_kernels.quantize.rows import QuantizedRows

OUTPUTS = 64  # of a block: the rows of a wgmma
ROWS = (16, 32, 64)  # of a block
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
    if x.low.dtype != jnp.int8 or (x.high is not None and x.high.dtype != jnp.int8):
        raise NotImplementedError(f"activations of {x.low.dtype}; int8")
    if w.high is not None and (w.high.shape[-1] != BLOCK or w.high.dtype != jnp.int8):
        raise NotImplementedError(
            f"{w.high.shape[-1]} outlier channels of {w.high.dtype}; {BLOCK} of int8, or none"
        )
    if w.outputs % OUTPUTS:
        raise NotImplementedError(f"{w.outputs} outputs; a multiple of {OUTPUTS}")


def _blocks(x: QuantizedRows, w: PackedMatrix, experts: jax.Array, tile: int) -> jax.Array:
    """x: rows of whole blocks; w with an axis E in front; experts: int32, the matrix of each block of rows."""
    assert x.low is not None and w.low is not None and w.scale is not None and x.low_scale is not None
    rows, groups, two_level = x.low.shape[0], w.groups, w.channel is not None
    # What the biased half of the codes adds, by row and group.
    biased = 8 * x.low.reshape(rows, groups, 2, BLOCK // 2)[:, :, 0].astype(jnp.int32).sum(-1).T
    scale = w.scale.swapaxes(1, 2)
    if not two_level:
        scale = jnp.repeat(scale, w.outputs // scale.shape[2], axis=2)
    per_group = x.low_scale.shape[1] > 1
    x_scale = jnp.broadcast_to(x.low_scale.T, (groups if per_group else 1, rows))
    channel = w.channel if two_level else jnp.ones((w.low.shape[0], w.outputs), jnp.float32)
    parts = _parts(w.outputs // OUTPUTS * len(experts), groups)
    given = [experts, x.low, biased, x_scale, lax.bitcast_convert_type(w.low, jnp.int8), scale, channel]
    if w.high is not None:
        assert x.high is not None and x.high_scale is not None
        given += [x.high, x.high_scale.T, w.high, w.high_scale]
    body = functools.partial(
        _block, groups=groups, each=-(-groups // parts), two_level=two_level, per_group=per_group
    )
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((parts, w.outputs, rows), jnp.float32),
        grid=(w.outputs // OUTPUTS, len(experts), parts),
        grid_names=("outputs", "rows", "part"),
        kernel_name="int4_matmul",
        scratch_types=_scratch(tile, w.high is not None),
    )
    out = kernel(*given)
    return out.sum(0).T


def _parts(blocks: int, groups: int) -> int:
    wanted = -(-BLOCKS_PER_PROCESSOR * processors() // blocks)
    return max(1, min(wanted, groups // FEWEST_GROUPS))


def _tiled(columns: int, size: int = 1) -> tuple:
    """How shared memory holds a matrix of numbers of `size` bytes for tensor cores and their results."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * size)  # type: ignore[abstract]


def _scratch(tile: int, high: bool) -> dict:
    half = BLOCK // 2
    scratch = {
        "w_ring": plgpu.SMEM((STAGES, OUTPUTS, half), jnp.int8, transforms=_tiled(half)),
        "x_ring": plgpu.SMEM((STAGES, tile, BLOCK), jnp.int8, transforms=_tiled(half)),
        "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "out_tile": plgpu.SMEM((OUTPUTS, tile), jnp.float32, transforms=_tiled(min(tile, OUT_COLUMNS), 4)),
        "stage": stage_types((OUTPUTS, half), jnp.int8),
    }
    if high:
        scratch |= {
            "w_high": plgpu.SMEM((OUTPUTS, BLOCK), jnp.int8, transforms=_tiled(BLOCK)),
            "x_high": plgpu.SMEM((tile, BLOCK), jnp.int8, transforms=_tiled(BLOCK)),
            "high_arrived": plgpu.Barrier(num_arrivals=2),
        }
    return scratch


def _block(
    experts, x, biased, x_scale, w, scale, channel, *rest,
    w_ring, x_ring, arrived, out_tile, stage, w_high=None, x_high=None, high_arrived=None,
    groups, each, two_level, per_group,
):  # fmt: skip
    high, out = rest[:-1], rest[-1]
    tile, half = x_ring.shape[1], BLOCK // 2
    column, block, part = (lax.axis_index(name) for name in ("outputs", "rows", "part"))
    expert = experts[block]
    outputs, rows = pl.ds(column * OUTPUTS, OUTPUTS), pl.ds(block * tile, tile)
    begin = part * each
    count = jnp.clip(groups - begin, 0, each)
    layout = plgpu.Layout.WGMMA

    def request(step):
        @pl.when(step < count)
        def _():
            slot, group = lax.rem(step, STAGES), begin + step
            packed, codes = pl.ds(group * half, half), pl.ds(group * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(w.at[expert, outputs, packed], w_ring.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(x.at[rows, codes], x_ring.at[slot], arrived.at[slot])

    def of_outputs(vector):
        """float or int [64], the same for all rows of activations."""
        vector = plgpu.load(vector, layout=layout.reduce(1), optimized=False)
        vector = vector.astype(jnp.int32) if vector.dtype == jnp.uint8 else vector
        return lax.broadcast_in_dim(vector, (OUTPUTS, tile), (0,))

    def of_rows(vector):
        return lax.broadcast_in_dim(
            plgpu.load(vector, layout=layout.reduce(0), optimized=False), (OUTPUTS, tile), (1,)
        )

    if high:
        here = part == 0

        @pl.when(here)
        def _():
            plgpu.copy_gmem_to_smem(high[2].at[expert, outputs], w_high, high_arrived)
            plgpu.copy_gmem_to_smem(high[0].at[rows], x_high, high_arrived)

    for step in range(STAGES - 1):
        request(step)

    def multiply(slot):
        """The integer sums of one group: int32 [64, tile]."""
        codes = w_ring[slot]

        def go(low, upper):
            x_low, x_upper = (x_ring.at[slot, :, pl.ds(begin, half)].T for begin in (0, half))
            wgmma_from_registers(low, codes & 15, x_low, stage)
            wgmma_from_registers(upper, codes & -16, x_upper, stage)
            plgpu.wgmma_wait(0)
            return low[...], upper[...]

        sums = plgpu.ACC((OUTPUTS, tile), jnp.int32)
        low, upper = pl.run_scoped(go, sums, sums)
        return low + (upper >> 4)

    def one_group(step, total):
        slot, group = lax.rem(step, STAGES), begin + step
        factor = of_outputs(scale.at[expert, group, outputs])
        too_much = of_rows(biased.at[group, rows])
        plgpu.barrier_wait(arrived.at[slot])
        sums = multiply(slot) - too_much
        plgpu.commit_smem()
        request(step + STAGES - 1)
        if two_level:
            return total + sums * factor
        if per_group:
            factor = factor * of_rows(x_scale.at[group, rows])
        return total + sums.astype(jnp.float32) * factor

    kind = jnp.int32 if two_level else jnp.float32
    total = plgpu.layout_cast(jnp.zeros((OUTPUTS, tile), kind), layout)
    total = lax.fori_loop(0, count, one_group, total).astype(jnp.float32)
    if two_level or not per_group:
        total = total * (of_outputs(channel.at[expert, outputs]) * of_rows(x_scale.at[0, rows]))
    if high:

        def add_high(total):
            plgpu.barrier_wait(high_arrived)

            def go(sums):
                plgpu.wgmma(sums, w_high, x_high.T)
                plgpu.wgmma_wait(0)
                return sums[...]

            sums = pl.run_scoped(go, plgpu.ACC((OUTPUTS, tile), jnp.int32)).astype(jnp.float32)
            factor = of_outputs(high[3].at[expert, outputs]) * of_rows(high[1].at[0, rows])
            return total + sums * factor

        total = lax.cond(here, add_high, lambda total: total, total)
    out_tile[...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, out.at[part, outputs, rows])
    plgpu.wait_smem_to_gmem(0)
