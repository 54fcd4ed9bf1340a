"""Keys whose channels are of like size, so that one 4-bit step suits a whole vector: scaled down in the weights, and the queries
up, which leaves every score as it was (SmoothAttention of QServe, arXiv 2405.04532, section 4.2).
"""

from __future__ import annotations

import jax
import numpy as np

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Layer

TOKENS = 4096  # of calibration text that are looked at
_POWER = 0.5  # of a channel's size, as published; a search for every head did no better
_LARGEST = 64.0  # scale, and one over the smallest


def smoothed(layer: Layer, scales: np.ndarray) -> Layer:
    """The layer with keys divided by `scales` [Hkv, Dh] and queries multiplied: the same function.

    Where queries and keys are normed the scales go into the norms; those of all heads are then alike if the norm's are.
    """
    new = jax.tree.map(lambda leaf: leaf, layer)
    attention = new.attention
    group = attention.qkv.shape[2] - 2
    if attention.q_norm is not None and attention.k_norm is not None:
        shared = attention.k_norm.ndim == 1
        attention.k_norm = attention.k_norm / (scales[0] if shared else scales)
        attention.q_norm = attention.q_norm * (scales[0] if shared else np.repeat(scales, group, axis=0))
        return new
    factor = np.ones(attention.qkv.shape[1:], np.float32)
    factor[:, :group] = scales[:, None]
    factor[:, group] = 1 / scales
    attention.qkv = attention.qkv * factor
    if attention.qkv_bias is not None:
        attention.qkv_bias = attention.qkv_bias * factor
    return new


def key_scales(k: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Scales of the channels of keys as they are stored, k [T, Hkv, Dh]: float32 [Hkv, Dh].

    Channels that are rotated together have one scale. All ones where queries and keys are clipped, which depends on size.
    """
    _, heads, dim = k.shape
    if config.clip_qkv is not None:
        return np.ones((heads, dim), np.float32)
    squares = np.square(k.astype(np.float64)).mean(0)
    if config.qk_norm == "head":
        squares = np.broadcast_to(squares.mean(0), squares.shape)
    half = config.rope.dim // 2
    pairs = (squares[:, :half] + squares[:, half : 2 * half]) / 2
    squares = np.concatenate((pairs, pairs, squares[:, 2 * half :]), axis=1)
    alive = squares > 0
    logs = np.log(np.where(alive, squares, 1)) / 2
    average = logs.sum(1, keepdims=True) / np.maximum(alive.sum(1, keepdims=True), 1)
    scales = np.exp(np.where(alive, logs - average, 0) * _POWER)
    return np.clip(scales, 1 / _LARGEST, _LARGEST).astype(np.float32)
