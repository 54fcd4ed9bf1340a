"""Weights as a low-bit matmul takes them, and how nibbles are packed."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128  # channels whose nibbles share bytes, where groups are as wide


class PackedMatrix(NamedTuple):
    """A weight matrix [N, K] in two parts, as activations have them: K = L + H. Grouped matmuls have an axis E in front.

    A weight of the low part is its code times `scale` of its group (times `channel` of its row, where there is one).

    Attributes:
      low: uint8 [N, L / 2], see `pack`; None where every weight is in the high part.
      scale: float32 [N / R, G]: R rows that follow each other and L / G channels share a scale. With `channel`,
        uint8 [N, G], 1 to 15, so that code times scale is an 8-bit integer.
      channel: float32 [N], or None.
      high: int8 [N, H], or float; None where L is all of K.
      high_scale: float32 [N]; None where high is float.
    """

    low: jax.Array | None
    scale: jax.Array | None
    channel: jax.Array | None
    high: jax.Array | None
    high_scale: jax.Array | None

    @property
    def outputs(self) -> int:
        """N."""
        part = self.high if self.low is None else self.low
        assert part is not None
        return part.shape[-2]

    @property
    def groups(self) -> int:
        """G."""
        assert self.scale is not None
        return self.scale.shape[-1]

    @property
    def group(self) -> int:
        """Channels of a group."""
        assert self.low is not None
        return 2 * self.low.shape[-1] // self.groups


def block_of(group: int) -> int:
    """Channels of a packing block: 128, or what of it divides the group."""
    return math.gcd(group, BLOCK)


def pack(codes: np.ndarray, group: int) -> np.ndarray:
    """int8 [..., N, L] in -8..7 -> uint8 [..., N, L / 2].

    A block of B channels (`block_of`) becomes B / 2 bytes. Byte j holds channel j plus 8 in its low half, and channel
    B / 2 + j, in two's complement, in its high half: `byte & 15` and `byte & -16` are both 8-bit integers at once.
    """
    block = block_of(group)
    halves = codes.reshape(*codes.shape[:-1], -1, 2, block // 2)
    low, high = (halves[..., 0, :] + 8).astype(np.uint8), halves[..., 1, :].astype(np.uint8) << 4
    return (low | high).reshape(*codes.shape[:-1], codes.shape[-1] // 2)


def unpack(packed: jax.Array, group: int) -> jax.Array:
    """The reverse of `pack`, for arrays on the device: uint8 [..., N, L / 2] -> int8 [..., N, L]."""
    half = block_of(group) // 2
    blocks = packed.reshape(*packed.shape[:-1], -1, half)
    low = (blocks & 15).astype(jnp.int8) - 8
    high = jax.lax.bitcast_convert_type(blocks, jnp.int8) >> 4
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    return jnp.stack((low, high), axis=-2).reshape(shape)
