"""Activations as a low-bit matmul takes them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class QuantizedRows(NamedTuple):
    """Rows of activations in two parts, the many channels in few bits and the outlier channels in more; K = L + H.

    A value is its code times its scale. Parts without a scale hold plain values; a part that has no channels is None.

    Attributes:
      low: int8 [M, L], or float where activations stay as they are.
      low_scale: float32 [M, S], one scale for each L / S channels that follow each other.
      high: int8 [M, H], or float.
      high_scale: float32 [M, 1].
    """

    low: jax.Array | None
    low_scale: jax.Array | None
    high: jax.Array | None
    high_scale: jax.Array | None

    @property
    def tokens(self) -> int:
        """M."""
        part = self.high if self.low is None else self.low
        assert part is not None
        return part.shape[0]

    def values(self) -> jax.Array:
        """float32 [M, K]: what the codes stand for."""
        parts = []
        for codes, scale in ((self.low, self.low_scale), (self.high, self.high_scale)):
            if codes is None:
                continue
            part = codes.astype(jnp.float32)
            if scale is not None:
                part = part * jnp.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)
            parts.append(part)
        return jnp.concatenate(parts, axis=1)
