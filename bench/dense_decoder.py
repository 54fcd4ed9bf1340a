"""One sequence at a time over plain arrays: decode under any choice of visible keys, to compare Quest with other choices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import forward, logits
from jaxinfer.models.layers import Decoder

_BLOCK = 512  # queries whose scores over all keys are held at once in the prefill


class Keys(NamedTuple):
    """keys, values: [L, T, Hkv, D]; seen: bool [L, T], keys that tokens to come may still attend to."""

    keys: jax.Array
    values: jax.Array
    seen: jax.Array


Forget = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(seen [T], weights [Hq, T] of the newest token, position) -> seen [T]: which keys stay for the tokens to come."""


def keep_all(seen: jax.Array, weights: jax.Array, position: jax.Array) -> jax.Array:
    return seen


def sliding_window(budget: int, sinks: int) -> Forget:
    """The first `sinks` tokens and the latest, `budget` in all (StreamingLLM, arXiv 2309.17453)."""

    def forget(seen, weights, position):
        at = jnp.arange(len(seen))
        return seen & ((at < sinks) | (at > position - (budget - sinks)))

    return forget


def tova(budget: int) -> Forget:
    """The `budget` keys that the newest token attends to most, over all heads; what is dropped is gone (TOVA, arXiv 2401.06104)."""

    def forget(seen, weights, position):
        liked = jnp.where(seen, weights.mean(0), -1.0).at[position].set(2.0)
        least = jax.lax.top_k(liked, min(budget, len(seen)))[0][-1]
        return seen & (liked >= least)

    return forget


class DenseDecoder:
    """Prefill and greedy decode of one sequence of at most `size` tokens.

    Args:
      model: float32, layers unstacked.
    """

    def __init__(self, config: ModelConfig, model: Decoder, size: int):
        self._config, self._model, self.size = config, model, size
        self._prefill = jax.jit(lambda model, ids: self._run(model, ids)[:2])
        self._looks = jax.jit(self._run)
        self._decoders: dict[Forget, Callable] = {}

    def prefill(self, ids: np.ndarray) -> Keys:
        """Keys of all tokens, each of which attends to everything before it."""
        padded = np.zeros(self.size, np.int32)
        padded[: len(ids)] = ids
        keys, values = self._prefill(self._model, padded)
        return Keys(keys, values, jnp.broadcast_to(jnp.arange(self.size) < len(ids), keys.shape[:2]))

    def looks(self, ids: np.ndarray) -> list[tuple[jax.Array, jax.Array]]:
        """The last token's queries [Hq, D] and all keys [size, Hkv, D], of every layer."""
        padded = np.zeros(self.size, np.int32)
        padded[: len(ids)] = ids
        keys, _, queries = self._looks(self._model, padded)
        return [(q[len(ids) - 1], k) for q, k in zip(queries, keys)]

    def decode(self, kept: Keys, start: int, tail: np.ndarray, count: int, forget: Forget) -> list[int]:
        """`count` greedy tokens after `tail`, which starts at position `start` and is given token by token.

        `forget` is asked after every token, the last of the prefill (`tail[0]`, computed again) included.
        """
        if forget not in self._decoders:
            self._decoders[forget] = jax.jit(partial(self._step, forget))
        step, token, out = self._decoders[forget], 0, []
        for index in range(len(tail) + count - 1):
            token = int(tail[index]) if index < len(tail) else token
            kept, best = step(self._model, kept, np.int32(token), np.int32(start + index))
            if index >= len(tail) - 1:
                token = int(best)
                out.append(token)
        return out

    def _run(self, model: Decoder, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys, values and queries of all layers and tokens."""
        at, stored = jnp.arange(self.size), []

        def attend(cache, layer, q, k, v, window):
            stored.append((k, v, q))
            return _causal(q, k, v), cache

        forward(model, self._config, ids, at, at + 1, attend, None)
        keys, values, queries = zip(*stored)
        return jnp.stack(keys), jnp.stack(values), jnp.stack(queries)

    def _step(self, forget: Forget, model: Decoder, kept: Keys, token, position) -> tuple[Keys, jax.Array]:
        def attend(kept: Keys, layer, q, k, v, window):
            keys, values = kept.keys.at[layer, position].set(k[0]), kept.values.at[layer, position].set(v[0])
            seen = kept.seen[layer].at[position].set(True)
            weights = _weights(q[0], keys[layer], seen)
            out = jnp.einsum("kgt,tkd->kgd", weights, values[layer]).reshape(q.shape)
            seen = forget(seen, weights.reshape(q.shape[1], -1), position)
            return out, Keys(keys, values, kept.seen.at[layer].set(seen))

        at = position[None]
        hidden, kept = forward(model, self._config, token[None], at, at + 1, attend, kept)
        return kept, jnp.argmax(logits(model, self._config, hidden)[0])


def _weights(q: jax.Array, keys: jax.Array, seen: jax.Array) -> jax.Array:
    """q [Hq, D], keys [T, Hkv, D], seen [T] -> attention weights [Hkv, G, T]."""
    heads, dim = keys.shape[1:]
    scores = jnp.einsum("kgd,tkd->kgt", q.reshape(heads, -1, dim), keys) * dim**-0.5
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


def _causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of a whole sequence, a block of queries at a time. q [T, Hq, D], k, v [T, Hkv, D] -> [T, Hq, D]."""
    tokens, heads, dim = k.shape

    def block(start):
        queries = jax.lax.dynamic_slice_in_dim(q, start, _BLOCK).reshape(_BLOCK, heads, -1, dim)
        scores = jnp.einsum("qkgd,tkd->kgqt", queries, k) * dim**-0.5
        visible = jnp.arange(tokens) <= start + jnp.arange(_BLOCK)[:, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("kgqt,tkd->qkgd", weights, v).reshape(_BLOCK, *q.shape[1:])

    return jax.lax.map(block, jnp.arange(0, tokens, _BLOCK)).reshape(q.shape)
