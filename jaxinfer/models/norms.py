"""RMS norm and layer norm, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Norm
from jaxinfer.models.shares import SplitScale
from jaxinfer.split import WHOLE
from pallas_kernels.quantize import Inputs, Normed


def norm(x: jax.Array, weights: Norm, config: ModelConfig) -> jax.Array:
    """Normalises the hidden axis, as the family does. x [T, D] -> [T, D]."""
    if config.norm == "rms":
        return rms_norm(x, weights.scale, config.norm_eps)
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + config.norm_eps)
    bias = 0.0 if weights.bias is None else weights.bias.astype(jnp.float32)
    return (wide * weights.scale.astype(jnp.float32) + bias).astype(x.dtype)


def normed(x: jax.Array, weights: Norm, config: ModelConfig) -> Inputs:
    """As `norm`; an RMS norm is left to the matmul that follows, which may join it with rounding."""
    return Normed(x, weights.scale, config.norm_eps) if config.norm == "rms" else norm(x, weights, config)


def rms_norm(x: jax.Array, scale: jax.Array | SplitScale, eps: float) -> jax.Array:
    """Root-mean-square norm over all of scale's axes together. x [..., *S], scale [*S] -> [..., *S]."""
    scale, over = (scale.array, scale.over) if isinstance(scale, SplitScale) else (scale, WHOLE)
    axes = tuple(range(-scale.ndim, 0))
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(over.mean(jnp.square(wide).mean(axes, keepdims=True)) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)
