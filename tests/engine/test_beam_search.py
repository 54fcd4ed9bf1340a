"""The search by itself, against the oracle over random tables of scores."""

import zlib

import numpy as np
import pytest
from beam_oracle import beam_search
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine.beam_search import BeamSearch, Candidates

EARLY = st.sampled_from([False, True, "never"])
PENALTIES = st.sampled_from([1.0, 0.0, 0.5, 2.0, -1.0])


def table(vocabulary: int, seed: int, forbidden: float = 0.0):
    """Log-probabilities that are a function of all tokens before; some tokens may be impossible."""

    def scores(tokens: list[int]) -> np.ndarray:
        draw = np.random.default_rng([seed, zlib.crc32(bytes(tokens))])
        logits = 3 * draw.standard_normal(vocabulary)
        if forbidden:
            logits[draw.random(vocabulary) < forbidden] = -np.inf
        logits[draw.integers(vocabulary)] = 1.0
        return (logits - np.logaddexp.reduce(logits)).astype(np.float32)

    return scores


def run(scores, search: BeamSearch, extra: int = 0) -> list[tuple[float, list[int]]]:
    """Drives a search as the engine does: each beam is told of its likeliest tokens only."""
    beams: list[list[int]] = [[]]
    while not search.over:
        told = []
        for tokens in beams:
            logprobs = scores(tokens)
            ids = np.argsort(-logprobs, kind="stable")[: search.candidates_needed + extra].astype(np.int32)
            missing = (0, search.candidates_needed + extra - len(ids))
            told.append(Candidates(np.pad(ids, missing, constant_values=-1), np.pad(logprobs[ids], missing)))
        picks = search.step(told)
        beams = [[*beams[pick.parent], pick.token] for pick in picks]
        assert len(beams) <= search.width
    return [
        (float(answer.score), [entry.token_id for entry in answer.trail.entries()])
        for answer in search.answers
    ]


@settings(max_examples=300, deadline=None)
@given(
    vocabulary=st.integers(2, 12),
    width=st.integers(2, 15),
    most=st.integers(1, 9),
    stops=st.sets(st.integers(0, 11), max_size=4),
    fewest=st.integers(0, 9),
    penalty=PENALTIES,
    early=EARLY,
    seed=st.integers(0, 2**16),
    extra=st.integers(0, 5),
    forbidden=st.sampled_from([0.0, 0.5]),
)
def test_a_search_told_of_few_candidates_equals_one_over_all_continuations(
    vocabulary, width, most, stops, fewest, penalty, early, seed, extra, forbidden
):
    fewest = min(fewest, most)
    scores = table(vocabulary, seed, forbidden)
    rules = {"fewest": fewest, "length_penalty": penalty, "early_stopping": early}
    expected = beam_search(scores, [], width=width, most=most, stops=stops, **rules)
    assert run(scores, BeamSearch(width, most, frozenset(stops), **rules), extra) == expected


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 6), st.integers(1, 4), st.integers(0, 3), EARLY, st.sampled_from([0.0, 1.0]), st.integers(0, 999)
)  # fmt: skip
def test_beams_for_every_continuation_find_the_best_of_all_answers(
    vocabulary, most, stop, early, penalty, seed
):
    scores = table(vocabulary, seed)
    search = BeamSearch(
        vocabulary**most, most, frozenset([stop]), length_penalty=penalty, early_stopping="never"
    )
    ((best, tokens), *_) = run(scores, search)

    def every(tokens: list[int], total: float):
        if tokens and (tokens[-1] == stop or len(tokens) == most):
            yield total / len(tokens) ** penalty, tokens
            return
        for token, logprob in enumerate(scores(tokens)):
            yield from every([*tokens, token], total + float(logprob))

    highest, likeliest = max(every([], 0.0), key=lambda answer: answer[0])
    assert best == pytest.approx(highest, abs=1e-5) and tokens == likeliest


def test_alternatives_and_log_probabilities_are_kept_along_each_answer():
    scores = table(7, seed=3)
    search = BeamSearch(3, 5, frozenset([2]), alternatives=2)
    run(scores, search)
    for answer in search.answers:
        entries, tokens = answer.trail.entries(), []
        for entry in entries:
            logprobs = scores(tokens)
            best = np.argsort(-logprobs)[:2]
            assert entry.top == tuple((int(i), float(logprobs[i])) for i in best)
            assert entry.logprob == float(logprobs[entry.token_id])
            tokens.append(entry.token_id)
        assert answer.score == pytest.approx(sum(e.logprob for e in entries) / len(entries), abs=1e-5)
