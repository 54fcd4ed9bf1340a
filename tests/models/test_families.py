"""Logits of every family against those of transformers (tests/data/make_families.py)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import CASES, attend, empty_cache, load_golden

from jaxinfer.models import forward, logits

TOLERANCE = 2e-4


@partial(jax.jit, static_argnames="config")
def run(model, config, tokens, positions, rope_length, cache, valid):
    hidden, cache = forward(model, config, tokens, positions, rope_length, attend, cache, valid)
    return logits(model, config, hidden), cache


def prefill(golden, model, pieces, dtype=jnp.float32, padded=None):
    """Logits [T, V] of the prompt, given in pieces of these lengths; every piece is padded to one length."""
    length, padded = len(golden.tokens), padded or max(pieces)
    cache = empty_cache(golden.config, length + padded, dtype)
    out, start = [], 0
    for piece in pieces:
        tokens = np.full(padded, 7, np.int32)
        tokens[:piece] = golden.tokens[start : start + piece]
        positions = start + np.arange(padded, dtype=np.int32)
        rope_length = np.maximum(length, positions + 1).astype(np.int32)
        valid = np.arange(padded) < piece
        scores, cache = run(model, golden.config, tokens, positions, rope_length, cache, valid)
        cache = cache._replace(filled=cache.filled + piece)
        out.append(np.asarray(scores[:piece]))
        start += piece
    return np.concatenate(out)


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers_in_one_piece_in_chunks_and_token_by_token(case):
    golden = load_golden(case)
    length = len(golden.tokens)
    cuts = {"one piece": [length], "chunks": [7] * (length // 7) + [length % 7], "tokens": [1] * length}
    for name, pieces in cuts.items():
        padded = length if name == "one piece" else 7  # tokens share the chunks' compilation
        off = np.abs(prefill(golden, golden.model, pieces, padded=padded) - golden.logits).max()
        assert off <= TOLERANCE, f"{name}: off by {off:.1e}"


@pytest.mark.parametrize("case", ["llama3", "qwen3", "phi3_longrope_long"])
def test_bfloat16_stays_close_to_float32(case):
    golden = load_golden(case)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), golden.model)
    scores = prefill(golden, model, [len(golden.tokens)], jnp.bfloat16)
    assert scores.dtype == np.float32
    assert np.abs(scores - golden.logits).mean() < 0.02 * np.abs(golden.logits).mean()
