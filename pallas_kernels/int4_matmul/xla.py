"""int4_matmul by panels of outputs: unpacked to 8-bit integers a panel at a time, multiplied as such. The reference."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul.matrix import PackedMatrix, unpack
from pallas_kernels.quantize.rows import QuantizedRows

# Outputs of a panel: what is unpacked at once.
PANEL = 1024
# XLA's integer dot on the CPU takes ten times as long for a single row as for eight.
FEWEST_ROWS = 8


def int4_matmul(x: QuantizedRows, w: PackedMatrix, group_sizes: jax.Array | None = None) -> jax.Array:
    """See `api.int4_matmul`."""
    if group_sizes is not None:
        return _grouped(x, w, group_sizes)
    panel = math.gcd(w.outputs, PANEL)
    if panel == w.outputs or panel < 64:
        return _panel(x, w)
    # Pairs of rows that share scales stay together: a panel is even.
    panels = jax.tree.map(lambda a: a.reshape(w.outputs // panel, -1, *a.shape[1:]), w)
    return lax.map(lambda part: _panel(x, part), panels).swapaxes(0, 1).reshape(x.tokens, w.outputs)


def _panel(x: QuantizedRows, w: PackedMatrix) -> jax.Array:
    parts = []
    if w.low is not None:
        assert x.low is not None and w.scale is not None
        codes = unpack(w.low, w.group)
        if x.low_scale is None:
            parts.append(_float_groups(x.low, codes, w.scale))
        elif w.channel is not None:
            fine = jnp.repeat(w.scale.astype(jnp.int8), w.group, axis=1)
            parts.append(_dot(x.low, codes * fine) * (x.low_scale * w.channel))
        else:
            parts.append(_integer_groups(x.low, x.low_scale, codes, w.scale))
    if w.high is not None:
        assert x.high is not None
        integers = x.high_scale is not None and w.high_scale is not None
        product = _dot(x.high, w.high) if integers else _float_dot(x.high, w.high)
        for scale in (x.high_scale, w.high_scale):
            product = product if scale is None else product * scale
        parts.append(product)
    return sum(parts[1:], parts[0])


def _integer_groups(x: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """One int32 sum per group, each scaled by its row's and its weights' scale. x [M, L], codes [N, L]."""
    rows, groups = x.shape[0], scale.shape[1]
    left, right = (a.reshape(a.shape[0], groups, -1).swapaxes(0, 1) for a in (_pad_rows(x), codes))
    numbers = (((2,), (2,)), ((0,), (0,)))
    sums = lax.dot_general(left, right, numbers, preferred_element_type=jnp.int32)[:, :rows]  # [G, M, N]
    of_rows = jnp.broadcast_to(x_scale, (rows, groups)).T[:, :, None]
    of_weights = jnp.repeat(scale, codes.shape[0] // scale.shape[0], axis=0).T[:, None, :]
    return (sums.astype(jnp.float32) * (of_rows * of_weights)).sum(0)


def _float_groups(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    groups = scale.shape[1]
    by_row = jnp.repeat(scale, codes.shape[0] // scale.shape[0], axis=0)[:, :, None]
    weights = codes.reshape(codes.shape[0], groups, -1) * by_row
    return _float_dot(x, weights.reshape(codes.shape).astype(x.dtype))


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Exact integer products in float32. x int8 [M, K], w int8 [N, K] -> [M, N]."""
    sums = lax.dot_general(_pad_rows(x), w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return sums[: x.shape[0]].astype(jnp.float32)


def _float_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    numbers = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        x, w.astype(x.dtype), numbers, precision=precision, preferred_element_type=jnp.float32
    )


def _pad_rows(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, max(0, FEWEST_ROWS - x.shape[0])), (0, 0)))


def _grouped(x: QuantizedRows, w: PackedMatrix, group_sizes: jax.Array) -> jax.Array:
    """Blocks of rows of one group each, as in `expert_mlp`."""
    rows, experts = x.tokens, group_sizes.shape[0]
    block = min(256, max(FEWEST_ROWS, 1 << (max(1, rows // experts) - 1).bit_length()))
    ends = jnp.cumsum(group_sizes)
    block_ends = jnp.cumsum(-(-group_sizes // block))
    padded = jax.tree.map(lambda a: jnp.pad(a, ((0, block), (0, 0))), x)

    def one_block(b, out):
        e = jnp.searchsorted(block_ends, b, side="right")
        before = jnp.where(e > 0, block_ends[e - 1], 0)
        start = ends[e] - group_sizes[e] + (b - before) * block
        mine = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, block), padded)
        matrix = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, e, keepdims=False), w)
        # Rows past the end of the group are the next group's, whose own block comes later and overwrites them.
        return lax.dynamic_update_slice_in_dim(out, int4_matmul(mine, matrix), start, 0)

    out = jnp.zeros((rows + block, w.outputs), jnp.float32)
    out = lax.fori_loop(0, block_ends[-1], one_block, out)[:rows]
    return jnp.where((jnp.arange(rows) < ends[-1])[:, None], out, 0)
