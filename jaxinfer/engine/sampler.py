"""Choosing tokens on the device, every row by its own rules."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.core import MAX_TOP_LOGPROBS
from jaxinfer.engine.batch import Knobs, Needs, Rows

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
) -> Sampled:
    """One token per row. logits: float32 [S, V]; lengths: int32 [S], tokens before the new one; no needs: greedy; top: how many
    of the likeliest tokens are reported.

    Log-probabilities are of the model's own distribution, before penalties, bias, temperature and filters.
    """
    if needs is None:
        best, likeliest = _argmax(logits)
        tokens = jnp.where(jnp.isfinite(likeliest), best, INVALID_TOKEN)
        return Sampled(tokens, *_no_logprobs(top, logits, tokens))
    scores = jax.lax.cond(
        needs.biases | needs.penalties,
        lambda: _adjust(logits, lengths, rows, knobs, needs, table),
        lambda: logits,
    )
    best, likeliest = _argmax(scores)
    finite = jnp.isfinite(likeliest)
    tokens = jax.lax.cond(
        needs.draws,
        lambda: jnp.where(
            knobs.temperatures > 0, _draw(scores, likeliest, lengths, rows, knobs, needs), best
        ),
        lambda: best,
    )
    tokens = jnp.where(finite, tokens, INVALID_TOKEN)
    reports = partial(_logprobs, top), partial(_no_logprobs, top)
    return Sampled(tokens, *jax.lax.cond(needs.logprobs, *reports, logits, tokens))


def _argmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index of the largest score, and that score. Two vector reductions: XLA on CPU runs argmax as scalar code."""
    largest = scores.max(axis=-1)
    vocabulary = scores.shape[-1]
    index = jnp.where(scores == largest[:, None], jnp.arange(vocabulary, dtype=jnp.int32), vocabulary)
    return index.min(axis=-1), largest


def _adjust(logits, lengths, rows: Rows, knobs: Knobs, needs: Needs, table: SlotTable) -> jax.Array:
    scores = jax.lax.cond(
        needs.penalties,
        lambda: _penalize(logits, lengths, rows, knobs, table.history[rows.slots]),
        lambda: logits,
    )
    return jax.lax.cond(needs.biases, lambda: _bias(scores, lengths, rows, knobs, table), lambda: scores)


def _bias(scores, lengths, rows: Rows, knobs: Knobs, table: SlotTable) -> jax.Array:
    row = jnp.arange(scores.shape[0])[:, None]
    # A slot keeps the biases of the sequence that had it before.
    values = jnp.where(rows.biased[:, None] > 0, table.bias_values[rows.slots], 0)
    scores = scores.at[row, table.bias_ids[rows.slots]].add(values, mode="drop")
    early = lengths < rows.min_lengths
    banned = jnp.where(early[:, None], table.banned_ids[rows.slots], scores.shape[1])
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


def _draw(scores, likeliest, lengths, rows: Rows, knobs: Knobs, needs: Needs) -> jax.Array:
    """Inverse-transform sampling: one uniform number per row, a function of (seed, position) alone."""
    temperatures = jnp.where(knobs.temperatures > 0, knobs.temperatures, 1.0)
    weights = jnp.exp((scores - likeliest[:, None]) / temperatures[:, None])  # 1 for the likeliest
    weights = jax.lax.cond(needs.filters, lambda: _filter(weights, rows.top_ks, knobs), lambda: weights)
    return _pick(weights, jax.vmap(_uniform)(rows.seeds_high, rows.seeds_low, lengths))


def _uniform(high: jax.Array, low: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(jnp.stack([high, low]).astype(jnp.uint32), impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(key, position))


def _filter(weights: jax.Array, top_ks: jax.Array, knobs: Knobs) -> jax.Array:
    """Zero what top-k, then top-p, then min-p drop. Tokens that tie with the last one kept are kept."""
    wanted = jnp.where(top_ks > 0, top_ks, weights.shape[1])
    weights = _keep(weights, lambda kept: kept.astype(jnp.int32).sum(axis=1), wanted)
    mass = knobs.top_ps * weights.sum(axis=1)
    filtered = _keep(weights, lambda kept: jnp.where(kept, weights, 0).sum(axis=1), mass)
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


def _pick(weights: jax.Array, uniform: jax.Array, block: int = 128) -> jax.Array:
    """Index whose cumulative weight first exceeds uniform * total, by blocks: sums of few terms lose no small weights."""
    rows, vocabulary = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocabulary % block))).reshape(rows, -1, block)
    sums = blocks.sum(axis=2)
    ends = jnp.cumsum(sums, axis=1)
    target = uniform * ends[:, -1]
    chosen = jnp.minimum((ends <= target[:, None]).sum(axis=1), _last_positive(sums))
    before = jnp.take_along_axis(ends - sums, chosen[:, None], axis=1)
    inside = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    offset = (jnp.cumsum(inside, axis=1) <= target[:, None] - before).sum(axis=1)
    offset = jnp.minimum(offset, _last_positive(inside))
    # Rounding may leave the offset on a token that was filtered out; the last kept one before it stands in.
    index = jnp.arange(block)
    kept = jnp.where((inside > 0) & (index <= offset[:, None]), index, -1).max(axis=1)
    first = jnp.argmax(inside > 0, axis=1)
    return (chosen * block + jnp.where(kept >= 0, kept, first)).astype(jnp.int32)


def _last_positive(values: jax.Array) -> jax.Array:
    return jnp.where(values > 0, jnp.arange(values.shape[1]), 0).max(axis=1)


def _logprobs(top: int, logits: jax.Array, tokens: jax.Array):
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[:, None], axis=1)[:, 0]
    width = min(top, logits.shape[1])
    values, ids = jax.lax.top_k(logprobs, width)
    pad = ((0, 0), (0, top - width))
    return chosen, jnp.pad(ids.astype(jnp.int32), pad, constant_values=-1), jnp.pad(values, pad)


def _no_logprobs(top: int, logits: jax.Array, tokens: jax.Array):
    rows = logits.shape[0]
    empty = jnp.zeros((rows, top))
    return jnp.zeros(rows), empty.astype(jnp.int32), empty
