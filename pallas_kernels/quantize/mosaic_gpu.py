"""quantize for Hopper: one warpgroup a token, from the residual stream to codes without a detour through memory.

A token's channels are rows of 128 in shared memory. They are taken out of it in the matrix's order, one load each, so
that every row in registers is a group, whose largest magnitude is a reduction along the row. The next token is copied
meanwhile. Results are those of `xla`, rounding for rounding.

Bytes of a token: 2 K in (4 K where gated), K and 4 K / 128 out; the order (4 K) and a norm's scale come once a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import gather, pl, plgpu, processors, put
from pallas_kernels.quantize.inputs import Gated, Inputs, Normed
from pallas_kernels.quantize.rows import QuantizedRows
from pallas_kernels.quantize.xla import SMALLEST

GROUP = 128
TILE = 64  # groups that registers hold as one array
MOST_TILES = 4
BLOCKS_PER_PROCESSOR = 4
SLOTS = 2  # tokens under way


def quantize(
    x: Inputs,
    order: jax.Array | None,
    *,
    bits: int,
    group: int,
    clip: float,
    outliers: int,
    outlier_bits: int,
) -> QuantizedRows:
    """See `api.quantize`."""
    tokens, channels = x.shape
    _check(x, bits, group, outliers, outlier_bits)
    groups = channels // GROUP
    kept = groups - outliers // GROUP
    tiles = -(-groups // TILE)
    plain = x.x if isinstance(x, Normed) else x.gate_up if isinstance(x, Gated) else x
    given = [plain.reshape(tokens, -1, groups, GROUP)]
    if isinstance(x, Normed):
        given.append(x.scale.reshape(groups, GROUP))
    if order is not None:
        given.append(order.reshape(groups, GROUP))
    outs = {"scales": jax.ShapeDtypeStruct((tokens, tiles * TILE), jnp.float32)}
    if kept:
        outs["low"] = jax.ShapeDtypeStruct((tokens, kept, GROUP), jnp.int8)
    if kept < groups:
        outs["high"] = jax.ShapeDtypeStruct((tokens, groups - kept, GROUP), jnp.int8)
    blocks = min(tokens, BLOCKS_PER_PROCESSOR * processors())
    body = functools.partial(
        _block,
        tokens=tokens,
        blocks=blocks,
        groups=groups,
        kept=kept,
        per_group=group > 0,
        steps=2 ** (bits - 1) - 1,
        clip=clip,
        eps=x.eps if isinstance(x, Normed) else None,
        ordered=order is not None,
    )
    made = plgpu.kernel(
        lambda *refs, **scratch: body(refs[: len(given)], dict(zip(outs, refs[len(given) :])), **scratch),
        out_type=tuple(outs.values()),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="quantize",
        scratch_types=_scratch(tiles * TILE, given),
    )(*given)
    out = dict(zip(outs, made))
    low = high = (None, None)
    if kept:
        low = out["low"].reshape(tokens, -1), out["scales"][:, : kept if group else 1]
    if kept < groups:
        high = out["high"].reshape(tokens, -1), out["scales"][:, groups - 1 : groups]
    return QuantizedRows(*low, *high)


def _check(x: Inputs, bits: int, group: int, outliers: int, outlier_bits: int) -> None:
    processors()
    channels = x.shape[1]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"activations of {x.dtype}; bfloat16")
    if channels % GROUP or channels > MOST_TILES * TILE * GROUP:
        raise NotImplementedError(
            f"{channels} channels; a multiple of {GROUP} up to {MOST_TILES * TILE * GROUP}"
        )
    if group not in (0, GROUP) or outliers not in (0, GROUP, channels):
        raise NotImplementedError(f"groups of {group}, {outliers} outlier channels; {GROUP}, none or all")
    if bits not in (4, 8) or outlier_bits != 8:
        raise NotImplementedError(f"{bits} bits, outliers in {outlier_bits}; 4 or 8, outliers in 8")
    if isinstance(x, Gated) and x.activation is not jax.nn.silu:
        raise NotImplementedError("an activation other than silu")


def _scratch(rows: int, given: list[jax.Array]) -> dict:
    x, *constants = given
    return {
        "ring": plgpu.SMEM((SLOTS, x.shape[1], rows, GROUP), x.dtype),
        "arrived": plgpu.Barrier(num_arrivals=x.shape[1], num_barriers=SLOTS),
        "constants": [plgpu.SMEM((rows, GROUP), array.dtype) for array in constants],
        "constants_arrived": plgpu.Barrier(num_arrivals=max(1, len(constants))),
        "codes": plgpu.SMEM((rows, GROUP), jnp.int8),
        "scale": plgpu.SMEM((rows,), jnp.float32),
    }


def _block(
    given, outs, *, ring, arrived, constants, constants_arrived, codes, scale,
    tokens, blocks, groups, kept, per_group, steps, clip, eps, ordered,
):  # fmt: skip
    x, *arrays = given
    layout = plgpu.Layout.WGMMA
    block = lax.axis_index("block")
    tiles = range(ring.shape[2] // TILE)

    def rows_of(tile):
        return pl.ds(tile * TILE, TILE)

    def numbers(tile):
        """int32 [64]: which groups a tile has."""
        return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout.reduce(1)) + tile * TILE

    def along(vector):
        """[64] as the rows of a tile."""
        return plgpu.layout_cast(lax.broadcast_in_dim(vector, (TILE, GROUP), (0,)), layout)

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=False)

    def request(token, slot):
        @pl.when(token < tokens)
        def _():
            for part in range(ring.shape[1]):
                to = ring.at[slot, part, pl.ds(0, groups)]
                plgpu.copy_gmem_to_smem(x.at[token, part], to, arrived.at[slot])

    def real(value, tile):
        """Zero past the last group, where shared memory holds anything."""
        value = jnp.where(along(numbers(tile)) < groups, value, jnp.zeros_like(value))
        return plgpu.layout_cast(value, layout)

    def natural(slot, tile):
        """float32 [64, 128], channels as they come."""
        value = load(ring.at[slot, 0, rows_of(tile)]).astype(jnp.float32)
        if ring.shape[1] == 2:
            value = value * lax.logistic(value) * load(ring.at[slot, 1, rows_of(tile)]).astype(jnp.float32)
            value = value.astype(x.dtype).astype(jnp.float32)
        return real(value, tile)

    def normalize(slot):
        values = [natural(slot, tile) for tile in tiles]
        squares = sum(jnp.sum(jnp.square(value), axis=1).sum() for value in values)
        factor = lax.rsqrt(squares / (groups * GROUP) + eps)
        for tile, value in zip(tiles, values):
            weight = load(constants[0].at[rows_of(tile)]).astype(jnp.float32)
            value = value * lax.broadcast(factor, value.shape) * weight
            put(ring.at[slot, 0, rows_of(tile)], value.astype(x.dtype), layout)
        plgpu.commit_smem()

    def in_order(slot, tile):
        order = real(load(constants[-1].at[rows_of(tile)]), tile)
        return real(gather(ring.at[slot, 0], order, layout).astype(jnp.float32), tile)

    def steps_of(largest):
        """The scale of each group of each tile, from their largest magnitudes."""
        alike = kept or groups  # groups with one scale, where groups have none of their own
        if not per_group:
            each = [jnp.where(numbers(tile) < alike, most, 0.0).max() for tile, most in zip(tiles, largest)]
            whole = lax.broadcast(functools.reduce(jnp.maximum, each), (TILE,))
        for tile, most in zip(tiles, largest):
            if not per_group:
                most = jnp.where(numbers(tile) < alike, whole, most)
            most = jnp.maximum(most, SMALLEST)
            scale = jnp.where(numbers(tile) < kept, jnp.float32(clip) * most / steps, most / 127)
            yield plgpu.layout_cast(scale, layout.reduce(1))

    def one_token(step, _):
        token, slot = block + step * blocks, lax.rem(step, SLOTS)
        plgpu.commit_smem()
        request(token + blocks, lax.rem(step + 1, SLOTS))
        plgpu.barrier_wait(arrived.at[slot])
        if eps is not None:
            normalize(slot)
        values = [(in_order if ordered else natural)(slot, tile) for tile in tiles]
        scales = steps_of([jnp.max(jnp.abs(value), axis=1) for value in values])
        plgpu.wait_smem_to_gmem(0)
        for tile, value, own in zip(tiles, values, scales):
            code = jnp.round(value / along(own)).astype(jnp.int32)
            if clip < 1:  # otherwise no code is out of reach
                most = jnp.where(numbers(tile) < kept, steps, 127)
                code = jnp.minimum(jnp.maximum(code, along(-most - 1)), along(most))
            put(codes.at[rows_of(tile)], code.astype(jnp.int8), layout)
            put(scale.at[rows_of(tile)], own, layout.reduce(1))
        plgpu.commit_smem()
        if "low" in outs:
            plgpu.copy_smem_to_gmem(codes.at[pl.ds(0, kept)], outs["low"].at[token])
        if "high" in outs:
            plgpu.copy_smem_to_gmem(codes.at[pl.ds(kept, groups - kept)], outs["high"].at[token])
        plgpu.copy_smem_to_gmem(scale, outs["scales"].at[token])

    for array, ref in zip(arrays, constants):
        plgpu.copy_gmem_to_smem(array, ref.at[pl.ds(0, groups)], constants_arrived)
    request(block, 0)
    if arrays:
        plgpu.barrier_wait(constants_arrived)
    lax.fori_loop(0, (tokens - block + blocks - 1) // blocks, one_token, None)
    plgpu.wait_smem_to_gmem(0)
