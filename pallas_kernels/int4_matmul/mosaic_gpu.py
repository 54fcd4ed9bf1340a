"""int4_matmul for Hopper: packed weights come by TMA, are opened in registers, and are the left operand of wgmma s8.

A block computes 64 outputs of up to 64 rows over a part of the channels. A byte of 128 channels' block holds two codes
(`matrix.pack`): `byte & 15` and `byte & -16` are 8-bit integers as they are, so opening costs one instruction for four codes,
and the two sums, one eight too large for each of its activations and one sixteen times too large, are mended as integers.
Two-level scales stay integers up to the end: one multiply-add a group and sum. Up to 64 rows without experts
all calls split sums alike, so a row's result does not depend on the others; with more, fewer parts fill the machine.

Activations of 16 bits take the codes as bfloat16, and each group's float sum its scale.

Bytes, against the floor of reading packed weights and scales once: both are read as they are stored, a scale of two
outputs by both (the eight groups of a sector one after another, from the first-level cache); activations come once for
each 64 outputs, mostly from the second-level cache; parts write and read 8 * M * N * parts bytes, M at least 8.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import processors
from pallas_kernels._roles import Role, launch
from pallas_kernels.int4_matmul._block import OUTPUTS, UNUSED, block_of_outputs, scratch_types
from pallas_kernels.int4_matmul.matrix import BLOCK, PackedMatrix
from pallas_kernels.quantize.rows import QuantizedRows

ROWS = (8, 16, 32, 64)  # of a block
# Blocks that fill the machine; below, the channels are split.
BLOCKS_PER_PROCESSOR = 2
FEWEST_GROUPS = 4  # of a part


def int4_matmul(x: QuantizedRows, w: PackedMatrix, group_sizes: jax.Array | None = None) -> jax.Array:
    """See `api.int4_matmul`."""
    if group_sizes is None:
        return launch(role(x, w), "int4_matmul")
    _check(x, w)
    return _grouped(x, w, group_sizes)


def role(x: QuantizedRows, w: PackedMatrix) -> Role:
    """A block for each 64 outputs, some rows and part of the channels."""
    _check(x, w)
    rows = x.tokens
    tile = next((size for size in ROWS if size >= rows), ROWS[-1])
    padded = jax.tree.map(lambda a: jnp.pad(a, ((0, -rows % tile), (0, 0))), x)
    matrices = jax.tree.map(lambda a: a[None], w)
    found = _blocks(padded, matrices, jnp.zeros(-(-rows // tile), jnp.int32), tile)
    return dataclasses.replace(found, finish=lambda parts: found.finish(parts)[:rows])


def _grouped(x: QuantizedRows, w: PackedMatrix, group_sizes: jax.Array) -> jax.Array:
    """Rows are moved so that every block of rows meets one matrix."""
    rows, experts = x.tokens, group_sizes.shape[0]
    tile = next((size for size in ROWS if size * experts >= rows), ROWS[-1])
    count = rows // tile + experts  # as many as can be
    ends, block_ends = jnp.cumsum(group_sizes), jnp.cumsum(-(-group_sizes // tile))
    of_row = _expert(ends, rows)  # experts: no matrix
    mine = jnp.minimum(of_row, experts - 1)
    first = jnp.where(mine > 0, block_ends[mine - 1], 0) * tile
    place = first + jnp.arange(rows) - (ends[mine] - group_sizes[mine])
    place = jnp.where(of_row < experts, place, count * tile)
    padded = jax.tree.map(
        lambda a: jnp.zeros((count * tile, a.shape[1]), a.dtype).at[place].set(a, mode="drop"), x
    )
    of_block = _expert(block_ends, count)
    blocks = _blocks(padded, w, jnp.where(of_block < experts, of_block, UNUSED), tile)
    return launch(blocks, "int4_matmul").at[place].get(mode="fill", fill_value=0)


def _expert(ends: jax.Array, count: int) -> jax.Array:
    """int32 [count]: in how many experts' places 0 to count - 1 lie beyond the end. No search: XLA would wait for the host."""
    return (jnp.arange(count)[:, None] >= ends).sum(1, dtype=jnp.int32)


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


def _blocks(x: QuantizedRows, w: PackedMatrix, experts: jax.Array, tile: int) -> Role:
    """x: rows of whole blocks; w with an axis E in front; experts: int32, the matrix of each block of rows, which is left
    unwritten where it is UNUSED."""
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
        assert x.high is not None and x.high_scale is not None and w.high_scale is not None
        given |= {
            "x_high_scale": x.high_scale.T,
            "w_high_scale": w.high_scale,
            "x_high": x.high,
            "w_high": w.high,
        }
    scale_rows = w.scale.shape[1]
    body = functools.partial(
        block_of_outputs,
        groups=groups,
        each=-(-groups // parts),
        scale_rows=scale_rows,
        pair=w.outputs // scale_rows,
    )
    return Role(
        grid=(w.outputs // OUTPUTS, len(experts), parts),
        body=lambda column, block, part, experts, *refs, **scratch: body(
            column, block, part, experts, dict(zip(given, refs)), refs[-1], **scratch
        ),
        inputs=(experts, *given.values()),
        outputs=(jax.ShapeDtypeStruct((parts, w.outputs, rows), jnp.float32),),
        scratch=scratch_types(tile, x.low.dtype, w.high is not None),
        finish=lambda parts: parts.sum(0).T,
    )


def _parts(blocks: int, groups: int) -> int:
    wanted = -(-BLOCKS_PER_PROCESSOR * processors() // max(blocks, 1))
    return max(1, min(wanted, groups // FEWEST_GROUPS))
