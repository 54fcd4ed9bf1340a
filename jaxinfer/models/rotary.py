"""Rotary position embedding, all its stretched kinds (arXiv:2104.09864; each kind as transformers computes it).

Two kinds depend on the length of the sequence: `dynamic` (its base) and `longrope` (short or long factors). That length is
given per token (`rope_length`), so a prompt gives the same keys in one piece, in chunks and token by token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.config import RopeConfig


class Angles(NamedTuple):
    """cos, sin: float32 [T, dim // 2], already scaled."""

    cos: jax.Array
    sin: jax.Array


def angles(rope: RopeConfig, positions: jax.Array, rope_length: jax.Array) -> Angles:
    """Rotation of every token. positions int32 [T], rope_length int32 [T] (sequence length that governs the token)."""
    frequencies, scale = _frequencies(rope, rope_length)
    turns = positions[:, None].astype(jnp.float32) * frequencies
    return Angles(jnp.cos(turns) * scale, jnp.sin(turns) * scale)


def rotate(x: jax.Array, by: Angles) -> jax.Array:
    """Rotates the first `dim` channels of each head, channel i with channel i + dim // 2. x [T, H, Dh] -> [T, H, Dh]."""
    half = by.cos.shape[-1]
    cos, sin = by.cos[:, None], by.sin[:, None]
    first, second = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half : 2 * half]))
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    turned = turned.astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    return jnp.concatenate((turned, x[..., 2 * half :]), axis=-1)


def prefix_namespace(rope: RopeConfig, prompt_length: int) -> int:
    """Prompts of different namespaces have different keys for the same tokens, so they must not share pages."""
    if rope.kind == "longrope":
        return int(prompt_length > rope.original_context)
    if rope.kind == "dynamic" and prompt_length > rope.original_context:
        return prompt_length
    return 0


def restarts_at(rope: RopeConfig) -> int | None:
    """Length beyond which a sequence that began shorter must have all its keys computed anew (with the long factors)."""
    return rope.original_context if rope.kind == "longrope" else None


def _frequencies(rope: RopeConfig, rope_length: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """Per-token frequencies [T or 1, dim // 2] and scale of cos and sin ([T, 1] or one number)."""
    if rope.kind == "dynamic":
        return _dynamic(rope, rope_length), 1.0
    if rope.kind == "longrope":
        long = (rope_length > rope.original_context)[:, None]
        plain = _bases(rope)
        tables = [1.0 / (np.asarray(f, np.float32) * plain) for f in (rope.short_factor, rope.long_factor)]
        short_scale, long_scale = _longrope_scales(rope)
        return jnp.where(long, tables[1], tables[0]), jnp.where(long, long_scale, short_scale)
    table, scale = fixed_frequencies(rope)
    return jnp.asarray(table)[None], scale


def fixed_frequencies(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """float32 [dim // 2] and the scale of cos and sin, for the kinds that do not depend on the length."""
    plain = 1.0 / _bases(rope)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope), _yarn_scale(rope)
    return plain, 1.0


def _exponents(rope: RopeConfig) -> np.ndarray:
    return np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)


def _bases(rope: RopeConfig) -> np.ndarray:
    return np.float32(rope.theta) ** _exponents(rope)


def _dynamic(rope: RopeConfig, rope_length: jax.Array) -> jax.Array:
    """NTK-aware base that grows with the length, once past the original context."""
    length = jnp.maximum(rope_length, rope.original_context).astype(jnp.float32)
    growth = rope.factor * length / rope.original_context - (rope.factor - 1)
    base = rope.theta * growth ** (rope.dim / (rope.dim - 2))
    return 1.0 / base[:, None] ** _exponents(rope)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, those between interpolated (Llama 3.1)."""
    wavelength = 2 * math.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((rope.original_context / wavelength - low) / (high - low), 0, 1)
    return ((1 - smooth) * plain / rope.factor + smooth * plain).astype(np.float32)


def _yarn(rope: RopeConfig) -> np.ndarray:
    """NTK-by-parts (arXiv:2309.00071, section 3.2)."""

    def channel(rotations: float) -> float:
        wavelength = rope.original_context / (rotations * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    plain = 1.0 / _bases(rope)
    return (plain / rope.factor * stretched + plain * (1 - stretched)).astype(np.float32)


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope_scales(rope: RopeConfig) -> tuple[float, float]:
    """Scales of cos and sin up to and beyond the original context."""
    if rope.short_mscale is not None and rope.long_mscale is not None:
        return rope.short_mscale, rope.long_mscale
    if rope.attention_factor is not None:
        scale = rope.attention_factor
    elif rope.factor <= 1:
        scale = 1.0
    else:
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))
    return scale, scale
