"""page_select for Hopper: a row's keys stay in the registers of one warpgroup from the first read to the last id.

The threshold is built bit by bit, as is the place of the last tie; prefix sums and the compaction are small matmuls on
the tensor cores, so there is no sort, no scatter and no atomic. Pages are numbered row by row of a [64, C] tile.

Bytes: 4 * G per page read once, and 4 per chosen page written: with D 128 and G 4 it is 3 % of the bounds that
page_scores reads. What bounds it is latency: a round of a compare, an add and a reduction over the warpgroup for each
bit until the threshold parts the keys, some twenty, and for ties another 13; with top_p 32 more.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors, swizzled

# Rows of the tile; also how many chosen pages are numbered at a time.
ROWS = 64
COLUMNS = (32, 64, 128)
HIGHEST, LOWEST = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min
FAINT = -1e30


def page_select(
    scores: jax.Array,
    pages: jax.Array,
    keep: jax.Array,
    *,
    width: int,
    first: int,
    last: int,
    scale: float,
    top_p: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.page_select`."""
    rows, heads, group, total = scores.shape
    processors()
    if total > ROWS * COLUMNS[-1]:
        raise NotImplementedError(f"{total} pages; at most {ROWS * COLUMNS[-1]}")
    columns = next(c for c in COLUMNS if total <= ROWS * c)
    tile = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, ROWS * columns - total)))
    tile = tile.reshape(rows, heads, group, ROWS, columns)
    blocks = -(-width // ROWS)
    operand = swizzled(columns)
    kernel = plgpu.kernel(
        functools.partial(_select_row, width=width, first=first, last=last, scale=scale, top_p=top_p),
        out_type=(
            jax.ShapeDtypeStruct((rows, heads, blocks * ROWS), jnp.int32),
            jax.ShapeDtypeStruct((rows, heads), jnp.int32),
        ),
        grid=(rows, heads),
        grid_names=("row", "head"),
        kernel_name="page_select",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types={
            "mask": plgpu.SMEM((ROWS, columns), jnp.bfloat16, transforms=operand),
            "triangle": plgpu.SMEM((columns, columns), jnp.bfloat16, transforms=operand),
            "prefix": plgpu.SMEM((ROWS, columns), jnp.bfloat16, transforms=operand),
            "holder": plgpu.SMEM((ROWS, ROWS), jnp.bfloat16, transforms=operand),
            "arrived": plgpu.Barrier(),
        },
    )
    upper = jnp.triu(jnp.ones((columns, columns), jnp.bfloat16))
    pages, keep = pages.astype(jnp.int32), keep.astype(jnp.int32)
    positions, number = kernel(tile, pages, keep, upper)
    # Padding rows are left unwritten.
    number = jnp.where((jnp.minimum(keep, pages) > 0)[:, None], number, 0)
    return jnp.clip(positions[..., :width], 0, total - 1), number


def _iota(shape, axis):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _across(vector, columns):
    """A value per row, along the row."""
    return lax.broadcast_in_dim(vector, (ROWS, columns), (0,))


def _down(vector):
    """A value per column, along the column."""
    return lax.broadcast_in_dim(vector, (ROWS, vector.shape[0]), (1,))


def _count(mask):
    return jnp.where(mask, 1, 0).sum(axis=1).sum(axis=0)


def _multiply(a, b, columns):
    def run(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))


def _select_row(
    scores, own, keep, upper, out, number,
    *, mask, triangle, prefix, holder, arrived, width, first, last, scale, top_p,
):  # fmt: skip
    row, head = (lax.axis_index(name) for name in ("row", "head"))
    columns = mask.shape[1]
    pages = jnp.clip(own[row], 0, ROWS * columns)
    wanted = jnp.minimum(jnp.minimum(keep[row], pages), width)

    @pl.when(wanted > 0)
    def _():
        plgpu.copy_gmem_to_smem(upper, triangle, arrived)
        index = _iota((ROWS, columns), 0) * columns + _iota((ROWS, columns), 1)
        ranks = _rank(scores.at[row, head], index < pages, scale)
        bits = lax.bitcast_convert_type(
            jnp.where(ranks == 0, 0.0, ranks), jnp.int32
        )  # -0.0 is no less than 0.0
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        forced = (index < first) | (index >= pages - last)
        keys = jnp.where(index < pages, jnp.where(forced, HIGHEST, keys), LOWEST)
        kept = wanted
        if top_p < 1:
            share = ranks * scale if scores.shape[2] == 1 else ranks
            fewest = jnp.clip(_fewest(keys, share, index < pages, top_p), first + last + 1, wanted)
            kept = jnp.where(wanted < pages, fewest, wanted)
        number[row, head] = kept
        threshold, reached = _threshold(keys, kept)
        cut = lax.cond(
            reached > kept,
            lambda: _last_tie(keys == threshold, index, kept - _count(keys > threshold)),
            lambda: jnp.int32(ROWS * columns),
        )
        chosen = (keys > threshold) | ((keys == threshold) & (index <= cut))

        mask[...] = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_wait(arrived)
        prefix[...] = _multiply(mask, triangle, columns).astype(jnp.bfloat16)  # exact: at most 128
        plgpu.commit_smem()
        in_row = jnp.where(chosen, 1, 0).sum(axis=1)
        _number(out.at[row, head], in_row, prefix, holder)


def _rank(scores, valid, scale):
    """[G, 64, C] -> [64, C]: see `api.page_select`."""
    layout = plgpu.Layout.WGMMA
    if scores.shape[0] == 1:
        return plgpu.load(scores.at[0], layout=layout, optimized=False)

    def one_head(g, ranks):
        share = plgpu.load(scores.at[g], layout=layout, optimized=False) * scale
        top = jnp.where(valid, share, FAINT).max(axis=1).max(axis=0)
        weights = jnp.where(valid, jnp.exp(share - top), 0.0).sum(axis=1).sum(axis=0)
        return jnp.maximum(ranks, share - (top + jnp.log(weights)))

    faint = plgpu.layout_cast(jnp.full(valid.shape, -jnp.inf, jnp.float32), layout)
    return lax.fori_loop(0, scores.shape[0], one_head, faint)


def _threshold(keys, wanted):
    """A threshold bit by bit from the top, and how many keys reach it: `wanted`, or more where the last ones tie."""

    def unsettled(state):
        bit, _, reached = state
        return (bit >= 0) & (reached > wanted)

    def one_bit(state):
        bit, threshold, reached = state
        higher = threshold + lax.shift_left(jnp.int32(1), bit)
        count = _count(keys >= higher)
        enough = count >= wanted
        return bit - 1, jnp.where(enough, higher, threshold), jnp.where(enough, count, reached)

    _, threshold, reached = lax.while_loop(
        unsettled, one_bit, (jnp.int32(31), jnp.int32(LOWEST), jnp.int32(keys.size))
    )
    return threshold, reached


def _fewest(keys, share, valid, top_p):
    """How many of the largest keys hold the part top_p of exp(share): a threshold bit by bit, then a part of its ties."""
    top = jnp.where(valid, share, FAINT).max(axis=1).max(axis=0)
    weights = jnp.where(valid, jnp.exp(share - top), 0.0)

    def held(mask):
        return jnp.where(mask, weights, 0.0).sum(axis=1).sum(axis=0)

    wanted = held(valid) * top_p

    def one_bit(i, threshold):
        higher = threshold + lax.shift_left(jnp.int32(1), 31 - i)
        return jnp.where(held(keys >= higher) >= wanted, higher, threshold)

    threshold = lax.fori_loop(0, 32, one_bit, jnp.int32(LOWEST))
    above, equal = keys > threshold, keys == threshold
    ties = (wanted - held(above)) * _count(equal).astype(jnp.float32) / held(equal)
    whole = ties.astype(jnp.int32)
    return _count(above) + whole + (whole.astype(jnp.float32) < ties).astype(jnp.int32)


def _last_tie(equal, index, ties):
    """The index of the ties-th equal key, bit by bit: the largest c with fewer than `ties` of them before it."""
    rounds = index.size.bit_length() - 1

    def one_bit(i, cut):
        further = cut + lax.shift_left(jnp.int32(1), rounds - 1 - i)
        return jnp.where(_count(equal & (index < further)) < ties, further, cut)

    return lax.fori_loop(0, rounds, one_bit, jnp.int32(0))


def _number(out, in_row, prefix, holder):
    """Writes the index of the j-th chosen page to out[j]. in_row: chosen pages of each row of the tile."""
    columns, square = prefix.shape[1], (ROWS, ROWS)
    line, column = _iota(square, 0), _iota(square, 1)
    begin = jnp.where(line < column, _across(in_row, ROWS), 0).sum(axis=0)
    end = begin + jnp.where(line == column, _across(in_row, ROWS), 0).sum(axis=0)
    for block in range(out.shape[0] // ROWS):
        slot = line + block * ROWS
        holds = (_down(begin) <= slot) & (slot < _down(end))
        holder[...] = jnp.where(holds, 1.0, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        line_of_slot = _multiply(holder, prefix, columns)
        place = jnp.where(holds, slot - _down(begin), 0).sum(axis=1)
        before = jnp.where(line_of_slot <= _across(place, columns).astype(jnp.float32), 1, 0).sum(axis=1)
        out[pl.ds(block * ROWS, ROWS)] = jnp.where(holds, column * columns, 0).sum(axis=1) + before
