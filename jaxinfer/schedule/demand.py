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

from jaxinfer.attention.quest import QuestPolicy
from jaxinfer.kvcache.pool import PACKED_BITS, page_bytes
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import abstract
from jaxinfer.models.layers import MoE
from pallas_kernels.page_bounds.scaled import bounds_bytes


class Span(NamedTuple):
    """Consecutive `tokens` of a sequence from position `start` on; the last `logits` of them are followed by a
    look at the vocabulary. `sparse`: each attends to the pages that it chooses, where a `QuestPolicy` rules."""

    start: int
    tokens: int
    logits: int = 1
    sparse: bool = False


class Demand(NamedTuple):
    """Attributes:
    flops: operations, two for each multiply-add of a matrix product or of attention.
    weight_bytes: weights read.
    kv_bytes: keys and values read and written, and bounds of pages read.
    link_bytes: of the weights, those that are not on the device.
    """

    flops: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    link_bytes: int = 0

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

    Quantized weights and packed keys count as the bytes that they are stored in. With Quest a sparse token sees its token
    budget in every layer that is neither windowed nor dense by policy, read once for each head that chooses, and reads the
    bounds of all its pages, once in `reuse_steps` tokens. Experts that the device has no slot for count on the link as well,
    as if all places were wanted alike and none were computed on the host: an upper bound.

    Norms, rotation, softmax, activations, the choice of pages and the writing of bounds are not counted: they neither
    dominate nor, most of them, leave the chip in a fused step.

    Args:
      dtype: of weights.
      kv_dtype: of keys and values, as `kvcache.pool.page_bytes` takes it; None is `dtype`.
      quest: how sparse tokens choose pages; None where all attend to everything.
      expert_slots: experts of all layers that the device holds; None for all.
      expert_bytes: of one expert of one layer as it is offloaded; None is as the model holds it.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        *,
        kv_dtype: str | None = None,
        quest: QuestPolicy | None = None,
        expert_slots: int | None = None,
        expert_bytes: int | None = None,
    ):
        model, width = abstract(config, dtype), jnp.dtype(dtype).itemsize
        kv_dtype = kv_dtype or dtype
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
        self._expert_bytes, self._away = expert, 0.0
        if moe and expert_slots is not None:
            layers = sum(config.moe_layers)
            self._expert_bytes = expert if expert_bytes is None else layers * expert_bytes
            self._away = 1 - expert_slots / (layers * moe.experts)
        self._embedding_bytes = config.hidden_size * width
        self._logit_flops = 2 * config.hidden_size * config.vocab_size
        self._head_bytes = _bytes((model.embed, model.head_bias))
        self._pair_flops = 4 * config.heads * config.head_dim
        self._key_bytes = page_bytes(config, 1, kv_dtype) // config.layers
        self._quest, dense_layers = quest, config.layers
        if quest is not None:
            dense_layers = quest.dense_layers
            bounds = quest.bounds_type("float32" if kv_dtype in PACKED_BITS else kv_dtype)
            self._bounds_bytes = config.kv_heads * bounds_bytes(config.head_dim, bounds) / quest.reuse_steps
            self._readers = quest.choosers(config.heads, config.kv_heads) // config.kv_heads
        kinds = Counter((window, layer >= dense_layers) for layer, window in enumerate(config.windows))
        self._layers = tuple((window, sparse and not window, n) for (window, sparse), n in kinds.items())

    def step(self, spans: Iterable[Span]) -> Demand:
        """One forward pass over all tokens of `spans`, one span for each row."""
        spans = list(spans)
        tokens = sum(span.tokens for span in spans)
        logits = sum(span.logits for span in spans)
        pairs, read = self._attention(spans, apart=False)
        return self._demand(tokens, logits, pairs, read, self._weights(tokens, logits))

    def decode(self, spans: Iterable[Span]) -> Demand:
        """As many forward passes as the longest span has tokens; pass i takes the token i of every span that has one,
        and its logits."""
        spans = list(spans)
        tokens = sum(span.tokens for span in spans)
        pairs, read = self._attention(spans, apart=True)
        ends = sorted(span.tokens for span in spans)
        weights, brought, done = 0, 0.0, 0
        for place, end in enumerate(ends):
            rows = len(ends) - place
            each = self._weights(rows, rows)
            weights, brought = weights + (end - done) * each[0], brought + (end - done) * each[1]
            done = end
        return self._demand(tokens, tokens, pairs, read, (weights, brought))

    def _demand(
        self, tokens: int, logits: int, pairs: int, read: float, weights: tuple[int, float]
    ) -> Demand:
        flops = tokens * self._token_flops + pairs * self._pair_flops + logits * self._logit_flops
        written = tokens * self._key_bytes * sum(layers for *_, layers in self._layers)
        return Demand(flops, weights[0], written + round(read), round(weights[1]))

    def _attention(self, spans: list[Span], *, apart: bool) -> tuple[int, float]:
        """(query, key) pairs, and bytes of keys, values and bounds read.

        Args:
          apart: each token is a pass of its own, and reads its keys itself.
        """
        pairs, read = 0, 0.0
        for window, sparse, layers in self._layers:
            for start, count, _, chooses in spans:
                if sparse and chooses:
                    every, chosen, pages = self._chosen(start, count)
                    pairs += layers * (every + chosen)
                    keys = every + chosen * self._readers
                    read += layers * (keys * self._key_bytes + pages * self._bounds_bytes)
                    continue
                seen = _pairs(start, count, window)
                pairs += layers * seen
                read += layers * (seen if apart else _seen(start, count, window)) * self._key_bytes
        return pairs, read

    def _chosen(self, start: int, count: int) -> tuple[int, int, int]:
        """Summed over `count` sparse tokens: keys of those so early that they attend to all, keys that the others choose, and
        pages whose bounds these read."""
        quest = self._quest
        assert quest is not None
        early = min(max(quest.dense_tokens - start, 0), count)
        growing = min(max(max(quest.dense_tokens, quest.token_budget) - start, 0), count)
        chosen = _pairs(start + early, growing - early, 0) + (count - growing) * quest.token_budget
        pages = _pages(start + count, quest.page_size) - _pages(start + early, quest.page_size)
        return _pairs(start, early, 0), chosen, pages

    def _weights(self, tokens: int, logits: int) -> tuple[int, float]:
        """Bytes of weights that one pass over `tokens` tokens reads, and those of them that are not on the device."""
        if not tokens:
            return 0, 0.0
        experts = min(self._experts, self._visits * tokens) * self._expert_bytes
        size = self._dense_bytes + tokens * self._embedding_bytes + experts
        return size + (self._head_bytes if logits else 0), experts * self._away


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


def _pages(tokens: int, size: int) -> int:
    """Pages of contexts of 1 to `tokens` tokens, summed."""
    whole, rest = divmod(tokens, size)
    return size * whole * (whole + 1) // 2 + rest * (whole + 1)


def _bytes(module) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(module))
