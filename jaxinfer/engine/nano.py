"""The attention of a step in two nano-batches: single rows' is left to run beside a product of the others."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer.models.linear import operands
from jaxinfer.schedule.step_times import StepShape, Way
from pallas_kernels.hybrid_attention import merge
from pallas_kernels.hybrid_matmul import hybrid_matmul
from pallas_kernels.ragged_attention import ragged_attention

Beside = Callable[..., tuple[jax.Array, jax.Array]]


def attend_in_two(
    shape: StepShape,
    q: jax.Array,
    pool: tuple,
    single: jax.Array,
    of_rows: tuple,
    listed: tuple,
    scale: float,
) -> tuple[jax.Array, Beside]:
    """Attention of the tokens behind the first nano-batch [R, Hq, Dh], and what gives that of the first, see `NanoBatches`.

    Args:
      q: [T, Hq, Dh]; those of single rows are all in the first nano-batch, beside what fills it up.
      pool: keys, values and the layer.
      single: bool [S].
      of_rows: page_table, starts, counts and kv_lengths of `PagedRows`.
      listed: page_lists and tokens of the rows, as in `page_attention`; 0 tokens for one that is not single.
    """
    table, starts, counts, kv_lengths = of_rows
    others = table, starts, jnp.where(single, 0, counts), kv_lengths
    attended = ragged_attention(q, *(*pool, *others), scale=scale)

    def beside(x, w) -> tuple[jax.Array, jax.Array]:
        implementation = None if shape.way is Way.PRODUCT else "xla"
        product, singles = hybrid_matmul(
            *operands(x, w), q[starts], *pool, *listed, scale=scale, implementation=implementation
        )
        first = merge(attended[: shape.first], singles, starts, single)
        return product.reshape(len(product), *w.shape[1:]), first

    return attended[shape.first :], beside
