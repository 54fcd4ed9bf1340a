"""The weights that training starts from: circuits for looking back, which chance would take millions of tokens to find.

The first layer's heads attend to the tokens one to four before (keys and queries are a constant direction of all embeddings,
turned by RoPE's quickest channels) and write what they find; heads of the next layers compare the present token with what
stands before others in the channels that RoPE hardly turns, and copy what they find: an induction head (Olsson et al.,
arXiv:2209.11895). Other weights are random. Training is free to change everything.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Attention, Decoder
from jaxinfer.models.rotary import fixed_frequencies

CONSTANT = 1.0  # of channel 0 in every embedding
SPREAD = 0.5  # standard deviation of the other channels
QUICK = 6  # pairs of channels that tell the distance
SHARPNESS = 14.0  # of the look at the token before: score differences of e^5 and more to its neighbours
MATCH = 8.0  # scale of the induction heads' scores
WRITE, COPY = 0.4, 0.3  # what heads add, over what they read
READ_OUT = 0.1  # of copied tokens, by the head


def prepare(model: Decoder, config: ModelConfig, seed: int) -> Decoder:
    """A model (layers unstacked, float32) with the starting weights in place of its own."""
    rng = np.random.default_rng(seed)
    embed = SPREAD * rng.standard_normal(model.embed.shape)
    embed[:, 0] = CONSTANT
    model.embed = jnp.asarray(embed, jnp.float32)
    layers = [layer for run in model.runs for layer in run]
    for layer in layers:
        _scale(layer, config, rng)
    read = _orthonormal(
        rng, config.hidden_size, config.head_dim
    )  # what the first layer's heads see of a token
    write = [_orthonormal(rng, config.hidden_size, config.head_dim) for _ in range(config.heads)]
    _look_back(layers[0].attention, config, read, write)
    copied, target = (_orthonormal(rng, config.hidden_size, config.head_dim) for _ in range(2))
    for index, layer in enumerate(layers[1:3]):
        _induce(layer.attention, config, (read, write[index]), (copied, target))
    if model.head is not None:
        head = READ_OUT * target @ copied.T @ embed.T + 0.02 * rng.standard_normal(embed.T.shape)
        model.head = jnp.asarray(head, jnp.float32)
    return model


def _scale(layer, config: ModelConfig, rng: np.random.Generator) -> None:
    """Random matrices of variance one over their inputs; smaller where they add to the residual stream."""
    wide = config.hidden_size
    attention, mlp = layer.attention, layer.mlp

    def random(like: jax.Array, inputs: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * inputs**-0.5 * rng.standard_normal(like.shape), jnp.float32)

    attention.qkv = random(attention.qkv, wide)
    attention.out = random(attention.out, config.heads * config.head_dim, 0.4)
    mlp.gate_up = random(mlp.gate_up, wide)
    mlp.down = random(mlp.down, mlp.down.shape[1], 0.4)
    mlp.router = random(mlp.router, wide)


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random orthonormal columns, none of which touches channel 0. [rows, columns]."""
    found = np.zeros((rows, columns))
    most = min(rows - 1, columns)
    found[1:, :most] = np.linalg.qr(rng.standard_normal((rows - 1, most)))[0]
    return found


def _look_back(attention: Attention, config: ModelConfig, read: np.ndarray, write: list[np.ndarray]) -> None:
    """Query head h attends to the token h + 1 before."""
    group, half = config.group, config.head_dim // 2
    frequencies = fixed_frequencies(config.rope)[0][:QUICK]
    qkv, out = (np.array(a) for a in (attention.qkv, attention.out))
    qkv[:, :, : group + 1] = 0
    seen = CONSTANT / (SPREAD**2 + (CONSTANT**2 - SPREAD**2) / config.hidden_size) ** 0.5  # channel 0, normed
    size = np.sqrt(SHARPNESS * config.head_dim**0.5 / 2) / seen
    for head in range(config.heads):
        kv, slot = divmod(head, group)
        turn = -(head + 1) * frequencies
        qkv[0, kv, slot, :QUICK], qkv[0, kv, slot, half : half + QUICK] = (
            size * np.cos(turn),
            size * np.sin(turn),
        )
        qkv[0, kv, group, :QUICK] = size
        qkv[:, kv, group + 1] = read
        out[head] = WRITE * write[head].T
    attention.qkv, attention.out = jnp.asarray(qkv), jnp.asarray(out)


def _induce(
    attention: Attention,
    config: ModelConfig,
    match: tuple[np.ndarray, np.ndarray],
    copy: tuple[np.ndarray, np.ndarray],
) -> None:
    """The first KV head's queries look for tokens that stand after one like the present token, and copy them.

    match: what the first layer reads of a token and where it writes it; copy: what is read here and where it goes.
    """
    group, half = config.group, config.head_dim // 2
    slow = [*range(half // 2, half), *range(half + half // 2, 2 * half)]
    qkv, out = (np.array(a) for a in (attention.qkv, attention.out))
    qkv[:, 0, : group + 1] = 0
    for slot in range(group):
        qkv[:, 0, slot, slow] = MATCH**0.5 * match[0][:, : len(slow)]
        out[slot] = COPY * copy[1].T
    qkv[:, 0, group, slow] = MATCH**0.5 * match[1][:, : len(slow)]
    qkv[:, 0, group + 1] = copy[0]
    attention.qkv, attention.out = jnp.asarray(qkv), jnp.asarray(out)
