"""What a call asks of the machine, counted from the model's shapes: operations, and bytes that have to move.

The terms are those of BlendServe's performance model (arXiv 2411.16102: operations, and bytes of keys and values, of a
request), kept exact for a step: attention's operations and the weights count as well, and GQA, sliding windows and
experts are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import abstract
from jaxinfer.models.layers import MoE


class Span(NamedTuple):
    """Consecutive `tokens` of a sequence from position `start` on; the last `logits` of them are followed by a
    look at the vocabulary."""

    start: int
    tokens: int
    logits: int = 1


class Demand(NamedTuple):
    """Attributes:
    flops: operations, two for each multiply-add of a matrix product or of attention.
    weight_bytes: weights read.
    kv_bytes: keys and values read and written.
    """

    flops: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


class DemandModel:
    """Counts the demand of calls of one model.

    With D the hidden size, V the vocabulary, Hq and Hkv heads of Dh channels, F the width of an MLP or expert, and K of E
    experts for each token, the operations of a token at position t are

      per layer       2 D Dh (2 Hq + 2 Hkv)            queries, keys, values, output
                    + 4 Hq Dh min(t + 1, window)       scores and weighted values
                    + 6 D F                            MLP, or 2 D E + K 6 D F for experts
      once            2 D V                            if its logits are wanted

    and the bytes of a forward pass over T tokens are

      weights         every parameter but embeddings and experts, once; T embedding rows; the head (a tied one is the
                      embedding) if any logits are wanted; min(E, K T) experts of each layer, as many as T tokens can touch
      keys, values    2 Hkv Dh per layer for each token written, and for each key that a row's tokens see, read once a row

    Norms, rotation, softmax and activations are not counted: they neither dominate nor leave the chip in a fused step.

    Args:
      dtype: of weights, keys and values.
    """

    def __init__(self, config: ModelConfig, dtype: str):
        model, width = abstract(config, dtype), jnp.dtype(dtype).itemsize
        moe = config.moe
        self._experts, self._visits = (moe.experts, moe.experts_per_token) if moe else (0, 0)
        expert = 0  # bytes of one expert, over all layers
        touched = 0  # weights that a token is multiplied with
        dense = _bytes(model.norm)
        for run in model.runs:
            dense += _bytes(run)
            touched += run.attention.qkv.size + run.attention.out.size
            mlp = run.mlp.gate_up.size + run.mlp.down.size
            packed = _bytes((run.mlp.gate_up, run.mlp.down))
            if isinstance(run.mlp, MoE):
                dense -= packed
                expert += packed // self._experts
                touched += run.mlp.router.size + self._visits * mlp // self._experts
            else:
                touched += mlp
        self._token_flops = 2 * touched
        self._dense_bytes = dense
        self._expert_bytes = expert
        self._embedding_bytes = config.hidden_size * width
        self._logit_flops = 2 * config.hidden_size * config.vocab_size
        self._head_bytes = _bytes((model.embed, model.head_bias))
        self._windows = tuple(Counter(config.windows).items())
        self._pair_flops = 4 * config.heads * config.head_dim
        self._key_bytes = 2 * config.kv_heads * config.head_dim * width

    def step(self, spans: Iterable[Span]) -> Demand:
        """One forward pass over all tokens of `spans`, one span for each row."""
        spans = list(spans)
        tokens = sum(span.tokens for span in spans)
        logits = sum(span.logits for span in spans)
        pairs = keys = 0
        for window, layers in self._windows:
            pairs += layers * sum(_pairs(start, count, window) for start, count, _ in spans)
            keys += layers * (tokens + sum(_seen(start, count, window) for start, count, _ in spans))
        return Demand(
            self._flops(tokens, pairs, logits), self._weights(tokens, logits), keys * self._key_bytes
        )

    def decode(self, spans: Iterable[Span]) -> Demand:
        """As many forward passes as the longest span has tokens; pass i takes the token i of every span that has one,
        and its logits."""
        spans = list(spans)
        tokens = sum(span.tokens for span in spans)
        pairs = keys = 0
        for window, layers in self._windows:
            seen = sum(_pairs(start, count, window) for start, count, _ in spans)
            pairs += layers * seen
            keys += layers * (tokens + seen)
        ends = sorted(span.tokens for span in spans)
        weights = done = 0
        for place, end in enumerate(ends):
            rows = len(ends) - place
            weights += (end - done) * self._weights(rows, rows)
            done = end
        return Demand(self._flops(tokens, pairs, tokens), weights, keys * self._key_bytes)

    def _flops(self, tokens: int, pairs: int, logits: int) -> int:
        return tokens * self._token_flops + pairs * self._pair_flops + logits * self._logit_flops

    def _weights(self, tokens: int, logits: int) -> int:
        """Bytes of weights that one pass over `tokens` tokens reads."""
        if not tokens:
            return 0
        size = self._dense_bytes + tokens * self._embedding_bytes
        size += min(self._experts, self._visits * tokens) * self._expert_bytes
        return size + (self._head_bytes if logits else 0)


def _pairs(start: int, count: int, window: int) -> int:
    """Keys that each of `count` tokens sees, summed: min(t + 1, window) for t in [start, start + count)."""
    end = start + count
    if window and end > window:
        growing = max(window - start, 0)  # tokens whose window is not full yet
        return _pairs(start, growing, 0) + (count - growing) * window
    return (end * (end + 1) - start * (start + 1)) // 2


def _seen(start: int, count: int, window: int) -> int:
    """Different keys that `count` tokens from `start` on see."""
    end = start + count
    return min(end, count + window - 1) if window else end


def _bytes(module) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(module))
