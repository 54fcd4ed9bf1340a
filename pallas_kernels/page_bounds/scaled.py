"""Bounds in eight bits: whole multiples of a scale that each page and head has to itself.

Scales are powers of two. So rounding down to a coarser scale gives the same whether it starts from the number itself or
from what a finer scale has already rounded down: floor(floor(x / s) / 2) = floor(x / (2 s)). Folding keys in one by one,
in any groups, therefore gives exactly the bounds of all of them at once, and nothing drifts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LARGEST = 127  # of a value; the smallest is its negative
SMALLEST_SCALE = 2.0**-100


class ScaledBounds(NamedTuple):
    """A bound is its value times its scale; the minimum is rounded down, the maximum up, so they still bound.

    values: int8 [L, N, Hkv, 2, D], as plain bounds
    scales: float32 [L, N, Hkv], powers of two
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    def widened(self) -> jax.Array:
        """As plain float32 bounds."""
        return self.values.astype(jnp.float32) * self.scales[..., None, None]


Bounds = jax.Array | ScaledBounds


def make_bounds(shape: tuple[int, int, int, int], dtype: str) -> Bounds:
    """Bounds of [L, N, Hkv, D] for pages that hold nothing yet; dtype is "int8" or a type of floats."""
    values = jnp.zeros((*shape[:3], 2, shape[3]), dtype)
    return ScaledBounds(values, jnp.full(shape[:3], SMALLEST_SCALE)) if dtype == "int8" else values


def bounds_bytes(head_dim: int, dtype: str) -> int:
    """Bytes of the bounds of one page and head."""
    return 2 * head_dim * jnp.dtype(dtype).itemsize + (4 if dtype == "int8" else 0)


def scale_for(largest: jax.Array) -> jax.Array:
    """The smallest scale whose values reach a number of that size: largest <= 127 * scale."""
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    # 127 / 64 is all sixes bits of a fraction; a fraction beyond it carries into the exponent.
    power = lax.bitcast_convert_type((bits + 0x1FFFF) & 0x7F800000, jnp.float32)
    return jnp.maximum(power * 2.0**-6, SMALLEST_SCALE)
