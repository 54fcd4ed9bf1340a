"""expert_mlp for Hopper: two grouped matmuls on the tensor cores, the first with the activation in its epilogue.

Pairs are laid out by expert and cut into blocks of rows of one expert each; blocks that no row needs end at once, so an
expert's weights are read only if a token wants it. A block of rows computes two tiles of columns side by side: those of gate
and up, or two neighbours of down. Weights come by TMA as they lie, and are the right operand of wgmma.

Bytes: the weights of the visited experts once for every 64 rows of theirs (128 where experts have many), after the first time
mostly from the second-level cache; rows once for each tile of columns; the hidden values written and read once. With few
tokens that is the floor, the weights of the visited experts. Operations: 6 * D * F for each row of a block, of which there are
at most 64 (128) times as many as blocks.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors, swizzled
from pallas_kernels.expert_mlp.xla import ACTIVATIONS

ROWS = 64  # of a warpgroup
DEPTH = 64  # channels of a step
COLUMNS = (128, 64)  # of a tile
ALIGNED = 8  # rows of a tile in shared memory: copies begin at a multiple


def expert_mlp(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """See `api.expert_mlp`."""
    processors()
    experts, model_dim, _ = gate_up.shape
    hidden_dim = down.shape[1]
    columns = next((c for c in COLUMNS if hidden_dim % c == 0 and model_dim % (2 * c) == 0), None)
    if not x.dtype == gate_up.dtype == down.dtype == jnp.bfloat16:
        raise NotImplementedError(f"{x.dtype} by {gate_up.dtype}; bfloat16")
    if columns is None:
        raise NotImplementedError(
            f"experts of {model_dim} by {hidden_dim}; multiples of {2 * COLUMNS[-1]} and {COLUMNS[-1]}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"expert_mlp: unknown activation {activation!r}; one of {sorted(ACTIVATIONS)}")
    tokens, top_k = expert_ids.shape
    groups = 2 if tokens * top_k >= 2 * ROWS * experts else 1
    pair_of_row, blocks, place = _blocks(expert_ids.reshape(-1), experts, ROWS * groups)
    hidden = _multiply(x[pair_of_row // top_k], gate_up, blocks, columns, groups, ACTIVATIONS[activation])
    padded = blocks._replace(start=jnp.arange(len(blocks.start), dtype=jnp.int32) * ROWS * groups)
    out = _multiply(hidden, down, padded, columns, groups, None)
    pairs = out.at[place].get(mode="fill", fill_value=0).reshape(tokens, top_k, -1)
    weights = jnp.where(expert_ids < 0, 0, expert_weights.astype(jnp.float32))
    # Term by term: a reduction may change its order with T.
    terms = (weights[:, k, None] * pairs[:, k] for k in range(top_k))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


class _Blocks(NamedTuple):
    """Blocks of rows, those in use first.

    expert, start: int32 [B], whose weights meet the rows from `start` on
    used: int32 [1]
    """

    expert: jax.Array
    start: jax.Array
    used: jax.Array


def _blocks(flat: jax.Array, experts: int, tile: int) -> tuple[jax.Array, _Blocks, jax.Array]:
    """flat: int32 [R], the expert of each pair.

    Returns the pair of every row to multiply, their blocks, and the row of each pair in the blocks' output. The rows of an
    expert begin at a multiple of ALIGNED. No sort, no search and no loop: XLA would wait for the host in the latter two.
    """
    pairs = flat.shape[0]
    visited = min(experts, pairs)
    rows, count = pairs + visited * ALIGNED + tile, pairs // tile + visited
    mine = flat[:, None] == jnp.arange(experts)
    sizes = mine.sum(0, dtype=jnp.int32)
    aligned = -(-sizes // ALIGNED) * ALIGNED
    begin = jnp.cumsum(aligned) - aligned
    blocks = -(-sizes // tile)
    block_end = jnp.cumsum(blocks)
    block_begin = block_end - blocks
    index = jnp.arange(count, dtype=jnp.int32)
    expert = jnp.minimum((index[:, None] >= block_end).sum(1, dtype=jnp.int32), experts - 1)
    start = jnp.where(index < block_end[-1], begin[expert] + (index - block_begin[expert]) * tile, 0)
    inside = (jnp.cumsum(mine, axis=0, dtype=jnp.int32) * mine).sum(1) - 1
    known = jnp.maximum(flat, 0)
    row = jnp.where(flat < 0, rows, begin[known] + inside)
    pair_of_row = jnp.zeros(rows, jnp.int32).at[row].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    place = jnp.where(flat < 0, count * tile, block_begin[known] * tile + inside)
    return pair_of_row, _Blocks(expert, start, block_end[-1:]), place


def _multiply(
    x: jax.Array,
    w: jax.Array,
    blocks: _Blocks,
    columns: int,
    groups: int,
    activation: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """x: [rows, K]; w: [E, K, N]. With an activation bfloat16 [B * tile, N / 2], act(gate) * up, else float32 [B * tile, N].

    Blocks that are not in use are left unwritten.
    """
    depth, width = w.shape[1:]
    tile, count = ROWS * groups, len(blocks.start)
    half, dtype = (width // 2, jnp.bfloat16) if activation else (width, jnp.float32)
    stages = 4 if groups == 1 else 3
    kernel = plgpu.kernel(
        functools.partial(_block, groups=groups, activation=activation),
        out_type=jax.ShapeDtypeStruct((count * tile, half), dtype),
        grid=(width // (2 * columns), count),
        grid_names=("columns", "block"),
        num_threads=groups,
        thread_name="group",
        kernel_name="expert_mlp",
        scratch_types={
            "x_ring": plgpu.SMEM((stages, groups, ROWS, DEPTH), jnp.bfloat16, transforms=swizzled(DEPTH)),
            "w_ring": plgpu.SMEM((stages, 2, DEPTH, columns), jnp.bfloat16, transforms=swizzled(DEPTH)),
            "tile": plgpu.SMEM((groups, ROWS, columns), dtype, transforms=_result_layout(dtype)),
            "arrived": plgpu.Barrier(num_arrivals=groups + 2, num_barriers=stages),
            "left": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        },
    )
    assert depth % DEPTH == 0
    return kernel(*blocks, x, w)


def _result_layout(dtype) -> tuple:
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]


def _block(expert_of, starts, used, x, w, out, *, x_ring, w_ring, tile, arrived, left, groups, activation):
    column, block, group = (lax.axis_index(name) for name in ("columns", "block", "group"))
    stages, columns = w_ring.shape[0], w_ring.shape[3]
    steps = w.shape[1] // DEPTH
    beside = w.shape[2] // 2 if activation else columns  # how far the second tile lies from the first

    @pl.when(block < used[0])
    def _():
        expert, start = expert_of[block], pl.multiple_of(starts[block], ALIGNED)
        first = column * columns if activation else 2 * column * columns

        def request(step):
            @pl.when((step < steps) & (group == 0))
            def _():
                slot, deep = lax.rem(step, stages), pl.ds(step * DEPTH, DEPTH)
                for i in range(groups):
                    rows = pl.ds(pl.multiple_of(start + i * ROWS, ALIGNED), ROWS)
                    plgpu.copy_gmem_to_smem(x.at[rows, deep], x_ring.at[slot, i], arrived.at[slot])
                for i in range(2):
                    wide = pl.ds(first + i * beside, columns)
                    plgpu.copy_gmem_to_smem(w.at[expert, deep, wide], w_ring.at[slot, i], arrived.at[slot])

        for step in range(stages):
            request(jnp.int32(step))

        def multiply(one, other):
            def one_step(step, carry):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(arrived.at[slot])
                plgpu.wgmma(one, x_ring.at[slot, group], w_ring.at[slot, 0])
                plgpu.wgmma(other, x_ring.at[slot, group], w_ring.at[slot, 1])
                plgpu.wgmma_wait(2)  # those of the step before have read their slot

                @pl.when(step > 0)
                def _():
                    before = lax.rem(step - 1, stages)
                    plgpu.barrier_arrive(left.at[before])

                    @pl.when(group == 0)
                    def _():
                        plgpu.barrier_wait(left.at[before])

                    request(step - 1 + stages)

                return carry

            lax.fori_loop(0, steps, one_step, None)
            plgpu.wgmma_wait(0)
            return one[...], other[...]

        sums = plgpu.ACC((ROWS, columns), jnp.float32)
        one, other = pl.run_scoped(multiply, sums, sums)
        rows = pl.ds((block * groups + group) * ROWS, ROWS)

        def write(value, at):
            tile.at[group][...] = value.astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile.at[group], out.at[rows, pl.ds(at, columns)])
            plgpu.wait_smem_to_gmem(0)

        if activation:
            write(activation(one) * other, first)
        else:
            write(one, first)
            write(other, first + columns)
