"""How one axis of the work is split over devices, as the program of one of them sees it: its place, and what it exchanges.

Programs on a mesh run under `jax.shard_map`: every device holds its share of the arrays and names what it exchanges. On one
device nothing is split, and nothing here adds an operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Split:
    """An axis in equal parts.

    Attributes:
      names: mesh axes that it is split over, the outermost first; none: every device has all of it.
      parts: how many.
    """

    names: tuple[str, ...] = ()
    parts: int = 1

    @property
    def place(self) -> jax.Array | int:
        """Which part is here."""
        return lax.axis_index(self.names) if self.names else 0

    def start(self, size: int) -> jax.Array | int:
        """Index of the first of the `size` elements here."""
        return self.place * size if self.names else 0

    def here(self, index: jax.Array, size: int) -> jax.Array:
        """Whether an element, by its index in the whole axis, is among the `size` here."""
        first = self.start(size)
        return (index >= first) & (index < first + size)

    def own(self, index: jax.Array, size: int) -> jax.Array:
        """Indices in the whole axis as those of the part here; `size` for elements that are elsewhere."""
        if not self.names:
            return index
        return jnp.where(self.here(index, size), index - self.start(size), size)

    def sum(self, x: jax.Array) -> jax.Array:
        return lax.psum(x, self.names) if self.names else x

    def mean(self, x: jax.Array) -> jax.Array:
        return lax.pmean(x, self.names) if self.names else x

    def max(self, x: jax.Array) -> jax.Array:
        return lax.pmax(x, self.names) if self.names else x

    def min(self, x: jax.Array) -> jax.Array:
        return lax.pmin(x, self.names) if self.names else x

    def gather(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """All parts side by side."""
        return lax.all_gather(x, self.names, axis=axis, tiled=True) if self.names else x

    def only(self, x: jax.Array, here: jax.Array) -> jax.Array:
        """What one device has, the one where `here` holds, on all of them."""
        return self.sum(jnp.where(here, x, 0)) if self.names else x


@dataclass(frozen=True)
class HeadSplit(Split):
    """The query heads in equal parts, each with the KV heads that they read.

    Attributes:
      copies: devices that hold the same KV head, each for its share of the query heads that read it.
    """

    copies: int = 1

    def of_group(self, q: jax.Array) -> jax.Array:
        """All query heads of the KV heads here, wherever they are. q [S, heads here, Dh] -> [S, heads of the group, Dh]."""
        if self.copies == 1:
            return q
        wide = self.copies * q.shape[1]
        first = self.place // self.copies * wide
        return lax.dynamic_slice_in_dim(self.gather(q), first, wide, axis=1)


WHOLE, ALL_HEADS = Split(), HeadSplit()
