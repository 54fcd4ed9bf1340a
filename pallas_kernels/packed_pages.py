"""KV pages of 8 or 4 bits: each token's head vector has a step and a smallest value of its own (Atom, arXiv 2310.19102, 4.3).

Atom's zero point is an integer in [0, 15], which saturates where all channels of a vector have one sign; here the
smallest value itself is kept, so no vector is outside of what its codes can say.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class PackedPages(NamedTuple):
    """A pool of quantized keys or values; takes the place of an array [L, N, Hkv, page, D].

    codes: uint8 [L, N, Hkv, page, D] (8 bits) or [L, N, Hkv, page, D / 2] (4 bits: the first half of the channels in the low
        nibbles, the second in the high ones)
    words: int32 [L, N, Hkv, page], two bfloat16 per token: the step in the upper half, the smallest value in the lower
    A channel is smallest + step * code.
    """

    codes: jax.Array
    words: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the codes."""
        return self.codes.shape

    def bits(self, head_dim: int) -> int:
        """8 or 4. Raises ValueError where the codes hold vectors of another size."""
        bits = {head_dim: 8, head_dim // 2: 4}.get(self.codes.shape[-1])
        if bits is None or head_dim % 2:
            raise ValueError(
                f"codes of {self.codes.shape[-1]} bytes for head dimension {head_dim}: expected {head_dim} (8 bits) or half (4)"
            )
        return bits


def pack(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """x [..., D] as codes uint8 [..., D * bits / 8] and words int32 [...]; the error is at most half a step.

    Raises ValueError for bits other than 8 and 4, or an odd D with 4.
    """
    if bits not in (4, 8) or (bits == 4 and x.shape[-1] % 2):
        raise ValueError(f"{bits} bits of {x.shape[-1]} channels: expected 8, or 4 of an even number")
    levels = 2**bits - 1
    x = x.astype(jnp.float32)
    low = -_rounded_up(-x.min(-1))
    step = _rounded_up((x.max(-1) - low) * (1 / levels))
    inverse = jnp.where(step > 0, 1 / jnp.where(step > 0, step, 1), 0)
    codes = jnp.clip(jnp.round((x - low[..., None]) * inverse[..., None]), 0, levels).astype(jnp.uint8)
    if bits == 4:
        first, second = jnp.split(codes, 2, axis=-1)
        codes = first | second << 4
    step, low = (lax.bitcast_convert_type(a, jnp.int32) for a in (step, low))
    return codes, step | lax.shift_right_logical(low, 16)


def unpack(codes: jax.Array, words: jax.Array, bits: int) -> jax.Array:
    """What codes [..., C] and words [...] stand for: float32 [..., D]."""
    if bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
    step, low = steps_and_lows(words)
    return codes.astype(jnp.float32) * step[..., None] + low[..., None]


def steps_and_lows(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both numbers of each word, float32."""
    step = lax.bitcast_convert_type(words & ~0xFFFF, jnp.float32)
    return step, lax.bitcast_convert_type(words << 16, jnp.float32)


def gather(pages: jax.Array | PackedPages, index: tuple, head_dim: int) -> jax.Array:
    """pages[index], an index of the first axes, in float32."""
    if isinstance(pages, PackedPages):
        return unpack(pages.codes[index], pages.words[index], pages.bits(head_dim))
    return pages[index].astype(jnp.float32)


def _rounded_up(x: jax.Array) -> jax.Array:
    """The smallest number of bfloat16's no smaller than x, as float32: its lower 16 bits are zero."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    cut = bits & ~0xFFFF  # towards zero, which is up where x is negative
    return lax.bitcast_convert_type(jnp.where((bits > 0) & (bits != cut), cut + 0x10000, cut), jnp.float32)
