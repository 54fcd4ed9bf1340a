"""Hadamard rotation of channels, block by block: what is large in one channel becomes small in all of its block."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 256


def rotation_block(channels: int) -> int:
    """Channels that are mixed: the largest power of two that divides them, at most 256."""
    return min(channels & -channels, LARGEST)


@functools.cache
def hadamard(size: int) -> np.ndarray:
    """float32 [size, size], orthogonal and symmetric (Sylvester's construction); size is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(size))


def rotate(x: jax.Array) -> jax.Array:
    """x [T, K] turned; turning twice gives x again."""
    block = rotation_block(x.shape[1])
    turn = hadamard(block)
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, block)
    turned = jax.lax.dot_general(
        blocks, jnp.asarray(turn), (((2,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_weights(weights: np.ndarray) -> np.ndarray:
    """Weights [N, K] for rotated inputs: the product stays what it was."""
    block = rotation_block(weights.shape[1])
    blocks = weights.reshape(weights.shape[0], -1, block)
    return (blocks @ hadamard(block).astype(weights.dtype)).reshape(weights.shape)
