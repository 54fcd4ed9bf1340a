"""The sampler against plain numpy."""

import jax
import numpy as np
import pytest

from jaxinfer.core import MAX_LOGIT_BIAS, SamplingParams
from jaxinfer.engine.batch import Knobs, Needs, Rows, needs_of
from jaxinfer.engine.sampler import INVALID_TOKEN, SlotTable, sample

VOCABULARY = 300  # no multiple of the sampler's block
CONTEXT = 32


def run(
    logits, sampling: SamplingParams, *, seeds=None, lengths=None, history=None, prompt_length=0, least=0
):
    """Sample one token per row of `logits` under one SamplingParams; row i has seed words (7, seeds[i])."""
    logits = np.asarray(logits, np.float32)
    size = len(logits)
    whole = np.zeros((len(Rows._fields), size), np.int32)
    rows = Rows(*whole)
    rows.slots[:] = np.arange(size)
    rows.seeds_high[:] = 7
    rows.seeds_low[:] = np.arange(size) if seeds is None else seeds
    rows.top_ks[:] = max(sampling.top_k, 0)
    rows.prompt_lengths[:] = prompt_length
    rows.min_lengths[:] = least
    rows.biased[:] = bool(sampling.logit_bias)
    values = (sampling.temperature, sampling.top_p, sampling.min_p)
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    knobs = Knobs(*(np.full(size, value, np.float32) for value in values + penalties))
    nowhere = np.full((size, MAX_LOGIT_BIAS), VOCABULARY, np.int32)
    bias_values = np.zeros((size, MAX_LOGIT_BIAS), np.float32)
    for index, (token, bias) in enumerate(sampling.logit_bias.items()):
        nowhere[:, index], bias_values[:, index] = token, bias
    banned = np.full((size, 4), VOCABULARY, np.int32)
    banned[:, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
    history = np.zeros((size, CONTEXT), np.int32) if history is None else np.asarray(history, np.int32)
    table = SlotTable(np.zeros(size, np.int32), history, nowhere, bias_values, banned)
    lengths = np.full(size, 5, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    needs = Needs(*map(np.bool_, needs_of(sampling)))
    table = jax.tree.map(jax.numpy.asarray, table)
    return jax.tree.map(np.asarray, jax.jit(sample)(logits, lengths, rows, knobs, needs, table))


def scores(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCABULARY)).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def kept_by(logits, sampling: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p and min-p, by sorting."""
    p = softmax(logits / sampling.temperature)
    order = np.argsort(-p)
    keep = np.ones(len(p), bool)
    if sampling.top_k > 0:
        keep[order[sampling.top_k :]] = False
    p = np.where(keep, p, 0) / p[keep].sum()
    if sampling.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= sampling.top_p]] = False
    keep &= p >= sampling.min_p * p.max()
    p = np.where(keep, p, 0)
    return p / p.sum()


def test_greedy_is_argmax_and_the_first_of_equals():
    logits = scores(8)
    assert (run(logits, SamplingParams(temperature=0)).tokens == logits.argmax(1)).all()
    assert run(np.zeros((2, VOCABULARY)), SamplingParams(temperature=0)).tokens.tolist() == [0, 0]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_reported_for_their_row_alone(poison):
    logits = scores(3)
    logits[1, 17] = poison
    for temperature in (0.0, 1.0):
        tokens = run(logits, SamplingParams(temperature=temperature)).tokens
        assert tokens[1] == INVALID_TOKEN and (tokens[[0, 2]] >= 0).all()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=1),
        SamplingParams(top_k=7, temperature=1.7),
        SamplingParams(top_p=0.6),
        SamplingParams(top_p=1e-6),
        SamplingParams(min_p=0.2),
        SamplingParams(top_k=20, top_p=0.8, min_p=0.1, temperature=0.9),
        SamplingParams(top_k=10_000),
    ],
    ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}-m{s.min_p}",
)
def test_draws_follow_the_filtered_distribution(sampling):
    draws = 4000
    logits = scores(1, seed=3)[0]
    expected = kept_by(logits, sampling)
    tokens = run(np.broadcast_to(logits, (draws, VOCABULARY)), sampling).tokens
    seen = np.bincount(tokens, minlength=VOCABULARY) / draws
    assert (expected[tokens] > 0).all(), "a token was drawn that the filters drop"
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(seen - expected) <= 5 * deviation + 2 / draws).all()  # rare tokens come once or twice


def test_a_draw_depends_on_seed_and_position_alone():
    logits = scores(1, seed=4)[0]
    many = run(np.broadcast_to(logits, (64, VOCABULARY)), SamplingParams(), seeds=np.arange(64)).tokens
    shuffled = np.random.default_rng(0).permutation(64)
    again = run(np.broadcast_to(logits, (64, VOCABULARY)), SamplingParams(), seeds=shuffled).tokens
    assert (again == many[shuffled]).all()
    alone = run(logits[None], SamplingParams(), seeds=[13]).tokens
    assert alone[0] == many[13]
    later = run(
        np.broadcast_to(logits, (64, VOCABULARY)), SamplingParams(), seeds=np.arange(64), lengths=[6] * 64
    )
    assert (later.tokens != many).any()


def test_penalties_over_prompt_and_answer():
    draw = np.random.default_rng(5)
    logits = scores(200, seed=6)
    history = draw.integers(0, VOCABULARY, (200, CONTEXT))
    history[:, :12] = np.argsort(-logits, axis=1)[:, draw.integers(0, 4, 12)]  # likely tokens, repeated
    lengths = draw.integers(6, CONTEXT, 200)
    prompt_length = 4
    sampling = SamplingParams(
        temperature=0, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3
    )
    tokens = run(logits, sampling, history=history, lengths=lengths, prompt_length=prompt_length).tokens
    changed = 0
    for row in range(200):
        adjusted = logits[row].astype(np.float64).copy()
        seen = np.unique(history[row, : lengths[row]])
        adjusted[seen] = np.where(adjusted[seen] > 0, adjusted[seen] / 1.3, adjusted[seen] * 1.3)
        counts = np.bincount(history[row, prompt_length : lengths[row]], minlength=VOCABULARY)
        adjusted -= 0.4 * counts + 0.7 * (counts > 0)
        assert tokens[row] == adjusted.argmax()
        changed += adjusted.argmax() != logits[row].argmax()
    assert changed > 100


def test_bias_and_tokens_banned_before_the_minimum_length():
    logits = np.zeros((2, VOCABULARY), np.float32)
    sampling = SamplingParams(
        temperature=0,
        logit_bias={8: 5.0, 9: 6.0, 11: -100.0},
        stop_token_ids=(9,),
        min_tokens=1,
        max_tokens=9,
    )
    early, late = run(logits, sampling, lengths=[5, 6], least=6).tokens
    assert (early, late) == (8, 9)


def test_logprobs_are_of_the_models_own_distribution():
    logits = scores(4, seed=8)
    out = run(logits, SamplingParams(temperature=0.3, top_k=3, logprobs=5))
    for row in range(4):
        expected = np.log(softmax(logits[row]))
        assert out.logprobs[row] == pytest.approx(expected[out.tokens[row]], abs=1e-5)
        assert out.top_ids[row, :5].tolist() == np.argsort(-expected)[:5].tolist()
        np.testing.assert_allclose(out.top_logprobs[row, :5], np.sort(expected)[::-1][:5], atol=1e-5)
