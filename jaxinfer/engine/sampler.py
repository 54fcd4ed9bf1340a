"""Choosing tokens on the device, every row by its own rules."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.core import MAX_TOP_LOGPROBS
from jaxinfer.engine.batch import Knobs, Needs, Rows
from jaxinfer.split import WHOLE, Split

INVALID_TOKEN = -1  # sampled where the logits are not finite


class SlotTable(NamedTuple):
    """Per-sequence state that lives on the device; the last slot is a spare for padding rows.

    Attributes:
      last_tokens: int32 [slots], sampled last.
      history: int32 [slots, context], prompt and answer, of sequences with penalties.
      bias_ids, bias_values: int32 and float32 [slots, B], padded by ids past the vocabulary.
      banned_ids: int32 [slots, E], tokens that must not come before the minimum length, padded likewise.
    """

    last_tokens: jax.Array
    history: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    banned_ids: jax.Array


class Sampled(NamedTuple):
    """tokens int32 [S] (INVALID_TOKEN where the logits were not finite), logprobs float32 [S], top_ids int32 [S, top],
    top_logprobs float32 [S, top]; the log-probabilities are zeros unless asked for. Arrays of JAX, or read by numpy."""

    tokens: Any
    logprobs: Any
    top_ids: Any
    top_logprobs: Any


def sample(
    logits: jax.Array,
    lengths: jax.Array,
    rows: Rows,
    knobs: Knobs,
    needs: Needs | None,
    table: SlotTable,
    top: int = MAX_TOP_LOGPROBS,
    vocabulary: Split = WHOLE,
) -> Sampled:
    """One token per row. logits: float32 [S, V]; lengths: int32 [S], tokens before the new one; no needs: greedy; top: how many
    of the likeliest tokens are reported; vocabulary: how it is split where V is the part of it that this device has. Parts are
    never brought together: only each one's best tokens, and sums over it.

    Log-probabilities are of the model's own distribution, before penalties, bias, temperature and filters.
    """
    if needs is None:
        best, likeliest = _argmax(logits, vocabulary)
        tokens = jnp.where(jnp.isfinite(likeliest), best, INVALID_TOKEN)
        return Sampled(tokens, *_no_logprobs(top, vocabulary, logits, tokens))
    scores = jax.lax.cond(
        needs.biases | needs.penalties,
        lambda: _adjust(logits, lengths, rows, knobs, needs, table, vocabulary),
        lambda: logits,
    )
    best, likeliest = _argmax(scores, vocabulary)
    finite = jnp.isfinite(likeliest)
    tokens = jax.lax.cond(
        needs.draws,
        lambda: jnp.where(
            knobs.temperatures > 0,
            _draw(scores, likeliest, lengths, rows, knobs, needs, vocabulary),
            best,
        ),
        lambda: best,
    )
    tokens = jnp.where(finite, tokens, INVALID_TOKEN)
    reports = partial(_logprobs, top, vocabulary), partial(_no_logprobs, top, vocabulary)
    return Sampled(tokens, *jax.lax.cond(needs.logprobs, *reports, logits, tokens))


def logprobs_of(logits: jax.Array, tokens: jax.Array, vocabulary: Split = WHOLE) -> jax.Array:
    """Log-probability of one token a row. logits float32 [S, V], tokens int32 [S] -> float32 [S]."""
    return _at(_log_softmax(logits, vocabulary), tokens, vocabulary)


def _argmax(scores: jax.Array, vocabulary: Split) -> tuple[jax.Array, jax.Array]:
    """First index of the largest score, and that score. Two vector reductions: XLA on CPU runs argmax as scalar code."""
    largest = vocabulary.max(scores.max(axis=-1))
    size = scores.shape[-1]
    ids = vocabulary.start(size) + jnp.arange(size, dtype=jnp.int32)
    index = jnp.where(scores == largest[:, None], ids, size * vocabulary.parts)
    return vocabulary.min(index.min(axis=-1)), largest


def _adjust(
    logits, lengths, rows: Rows, knobs: Knobs, needs: Needs, table: SlotTable, vocabulary: Split
) -> jax.Array:
    size = logits.shape[1]
    scores = jax.lax.cond(
        needs.penalties,
        lambda: _penalize(logits, lengths, rows, knobs, vocabulary.own(table.history[rows.slots], size)),
        lambda: logits,
    )
    return jax.lax.cond(
        needs.biases, lambda: _bias(scores, lengths, rows, knobs, table, vocabulary), lambda: scores
    )


def _bias(scores, lengths, rows: Rows, knobs: Knobs, table: SlotTable, vocabulary: Split) -> jax.Array:
    row, size = jnp.arange(scores.shape[0])[:, None], scores.shape[1]
    # A slot keeps the biases of the sequence that had it before.
    values = jnp.where(rows.biased[:, None] > 0, table.bias_values[rows.slots], 0)
    scores = scores.at[row, vocabulary.own(table.bias_ids[rows.slots], size)].add(values, mode="drop")
    early = lengths < rows.min_lengths
    banned = jnp.where(early[:, None], vocabulary.own(table.banned_ids[rows.slots], size), size)
    return scores.at[row, banned].set(-jnp.inf, mode="drop")


def _penalize(scores, lengths, rows: Rows, knobs: Knobs, history: jax.Array) -> jax.Array:
    """OpenAI's presence and frequency penalties over the answer, CTRL's repetition penalty (arXiv:1909.05858) over all."""
    position = jnp.arange(history.shape[1])[None]
    row = jnp.arange(scores.shape[0])[:, None]
    known = (position < lengths[:, None]).astype(jnp.float32)
    answer = known * (position >= rows.prompt_lengths[:, None])
    seen = jnp.zeros_like(scores).at[row, history].add(known, mode="drop")
    counts = jnp.zeros_like(scores).at[row, history].add(answer, mode="drop")
    repetition = jnp.where(seen > 0, knobs.repetition[:, None], 1.0)
    scores = jnp.where(scores > 0, scores / repetition, scores * repetition)
    scores = scores - knobs.frequency[:, None] * counts
    return scores - knobs.presence[:, None] * (counts > 0)


def _draw(scores, likeliest, lengths, rows: Rows, knobs: Knobs, needs: Needs, vocabulary: Split) -> jax.Array:
    """Inverse-transform sampling: one uniform number per row, a function of (seed, position) alone."""
    temperatures = jnp.where(knobs.temperatures > 0, knobs.temperatures, 1.0)
    weights = jnp.exp((scores - likeliest[:, None]) / temperatures[:, None])  # 1 for the likeliest
    weights = jax.lax.cond(
        needs.filters, lambda: _filter(weights, rows.top_ks, knobs, vocabulary), lambda: weights
    )
    return _pick(weights, jax.vmap(_uniform)(rows.seeds_high, rows.seeds_low, lengths), vocabulary)


def _uniform(high: jax.Array, low: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(jnp.stack([high, low]).astype(jnp.uint32), impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(key, position))


def _filter(weights: jax.Array, top_ks: jax.Array, knobs: Knobs, vocabulary: Split) -> jax.Array:
    """Zero what top-k, then top-p, then min-p drop. Tokens that tie with the last one kept are kept."""

    def total(terms: jax.Array) -> jax.Array:
        return vocabulary.sum(terms.sum(axis=1))

    wanted = jnp.where(top_ks > 0, top_ks, weights.shape[1] * vocabulary.parts)
    weights = _keep(weights, lambda kept: total(kept.astype(jnp.int32)), wanted)
    mass = knobs.top_ps * total(weights)
    filtered = _keep(weights, lambda kept: total(jnp.where(kept, weights, 0)), mass)
    weights = jnp.where((knobs.top_ps < 1)[:, None], filtered, weights)
    return jnp.where(weights >= knobs.min_ps[:, None], weights, 0)


def _keep(weights: jax.Array, measure, wanted: jax.Array) -> jax.Array:
    """Keep the weights above the highest threshold at which `measure(kept)` still reaches `wanted`.

    Bisection over the bits of the threshold (weights are in [0, 1], and non-negative floats sort as their bits do):
    exact, and without the sort that top-p usually needs.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high + 1) // 2
        enough = measure(bits >= middle[:, None]) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    rows = weights.shape[0]
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros(rows, jnp.int32), jnp.full(rows, one)))
    return jnp.where(bits >= low[:, None], weights, 0)


def _pick(weights: jax.Array, uniform: jax.Array, vocabulary: Split = WHOLE, block: int = 128) -> jax.Array:
    """Index whose cumulative weight first exceeds uniform * total, by blocks: sums of few terms lose no small weights."""
    rows, size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -size % block))).reshape(rows, -1, block)
    sums = vocabulary.gather(blocks.sum(axis=2))
    ends = jnp.cumsum(sums, axis=1)
    target = uniform * ends[:, -1]
    chosen = jnp.minimum((ends <= target[:, None]).sum(axis=1), _last_positive(sums))
    before = jnp.take_along_axis(ends - sums, chosen[:, None], axis=1)
    own = vocabulary.own(chosen, blocks.shape[1])
    inside = jnp.take_along_axis(blocks, own[:, None, None], axis=1)[:, 0]
    offset = (jnp.cumsum(inside, axis=1) <= target[:, None] - before).sum(axis=1)
    offset = jnp.minimum(offset, _last_positive(inside))
    # Rounding may leave the offset on a token that was filtered out; the last kept one before it stands in.
    index = jnp.arange(block)
    kept = jnp.where((inside > 0) & (index <= offset[:, None]), index, -1).max(axis=1)
    first = jnp.argmax(inside > 0, axis=1)
    found = vocabulary.start(size) + own * block + jnp.where(kept >= 0, kept, first)
    return vocabulary.only(found, own < blocks.shape[1]).astype(jnp.int32)


def _last_positive(values: jax.Array) -> jax.Array:
    return jnp.where(values > 0, jnp.arange(values.shape[1]), 0).max(axis=1)


def _log_softmax(logits: jax.Array, vocabulary: Split) -> jax.Array:
    if not vocabulary.names:
        return jax.nn.log_softmax(logits)
    shifted = logits - vocabulary.max(logits.max(axis=1))[:, None]
    return shifted - jnp.log(vocabulary.sum(jnp.exp(shifted).sum(axis=1)))[:, None]


def _at(values: jax.Array, tokens: jax.Array, vocabulary: Split) -> jax.Array:
    """One value of each row. [S, V], int32 [S] -> [S]."""
    size = values.shape[1]
    own = vocabulary.own(tokens, size)
    return vocabulary.only(jnp.take_along_axis(values, own[:, None], axis=1)[:, 0], own < size)


def _logprobs(top: int, vocabulary: Split, logits: jax.Array, tokens: jax.Array):
    logprobs = _log_softmax(logits, vocabulary)
    chosen = _at(logprobs, jnp.maximum(tokens, 0), vocabulary)
    values, ids = _top(logprobs, top)
    if (
        vocabulary.names
    ):  # the best of each part, in the order of the parts: equal ones stay in the order of their ids
        everyone = vocabulary.gather(ids + vocabulary.start(logits.shape[1]))
        values, ranks = _top(vocabulary.gather(values), top)
        ids = jnp.take_along_axis(everyone, ranks, axis=1)
    pad = ((0, 0), (0, top - ids.shape[1]))
    return chosen, jnp.pad(ids.astype(jnp.int32), pad, constant_values=-1), jnp.pad(values, pad)


def _top(values: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    return jax.lax.top_k(values, min(top, values.shape[1]))


def _no_logprobs(top: int, vocabulary: Split, logits: jax.Array, tokens: jax.Array):
    rows = logits.shape[0]
    empty = jnp.zeros((rows, top))
    return jnp.zeros(rows), empty.astype(jnp.int32), empty
