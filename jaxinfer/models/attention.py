"""The attention block around whatever attends: projections, query and key norms, clipping, rotation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.models import rotary
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Attention
from jaxinfer.models.linear import linear
from jaxinfer.models.norms import rms_norm
from pallas_kernels.quantize import Inputs


def qkv(
    x: Inputs, weights: Attention, config: ModelConfig, angles: rotary.Angles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries and keys, and values. x [T, D] -> q [T, Hq, Dh], k [T, Hkv, Dh], v [T, Hkv, Dh]."""
    group = config.group
    fused = linear(x, weights.qkv, weights.qkv_bias)  # [T, Hkv, G+2, Dh]
    q = fused[:, :, :group].reshape(x.shape[0], config.heads, config.head_dim)
    k, v = fused[:, :, group], fused[:, :, group + 1]
    if weights.q_norm is not None and weights.k_norm is not None:
        q = rms_norm(q, weights.q_norm, config.norm_eps)
        k = rms_norm(k, weights.k_norm, config.norm_eps)
    if config.clip_qkv is not None:
        q, k, v = (jnp.clip(a, -config.clip_qkv, config.clip_qkv) for a in (q, k, v))
    return rotary.rotate(q, angles), rotary.rotate(k, angles), v
