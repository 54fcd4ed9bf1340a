"""Pages and prefixes shared among sequences: admission, chunks, preemption."""

import numpy as np
import pytest
from helpers import LLAMA, answers, greedy, make_engine, prompts, request

from jaxinfer.core import Request


@pytest.mark.parametrize("chunk", [1, 16, 31])
@pytest.mark.parametrize("sharing", ["true", "false"])
def test_chunks_and_prefix_hits_change_nothing(chunk, sharing):
    work = prompts(6, seed=1)
    engine = make_engine(overrides=(f"engine.chunk={chunk}", f"cache.prefix_sharing={sharing}"))
    for _ in range(2):
        out = answers(engine, [request(str(i), p) for i, p in enumerate(work)])
        assert all(list(out[str(i)].token_ids) == greedy(LLAMA, p, 8) for i, p in enumerate(work))
    assert (engine.metrics.cached_tokens > 0) == (sharing == "true")


def test_a_shared_prefix_is_computed_once_in_one_batch():
    draw = np.random.default_rng(2)
    shared = draw.integers(3, 97, 96)
    work = [np.concatenate([shared, draw.integers(3, 97, 5)]) for _ in range(8)]
    engine = make_engine()
    answers(engine, [request(str(i), p, max_tokens=1) for i, p in enumerate(work)])
    assert engine.metrics.computed_tokens == 96 + 8 * 5


def test_a_pool_too_small_preempts_and_answers_the_same():
    work = prompts(8, seed=4, low=20, high=40)
    engine = make_engine(overrides=("cache.pages=20", "cache.page_size=8"))
    out = answers(engine, [request(str(i), p, max_tokens=60) for i, p in enumerate(work)])
    assert engine.metrics.preemptions > 0
    assert all(list(out[str(i)].token_ids) == greedy(LLAMA, p, 60) for i, p in enumerate(work))


def test_prompts_in_chunks_do_not_take_the_pages_that_others_still_need():
    work = prompts(12, seed=14, low=100, high=140)
    engine = make_engine(overrides=("cache.pages=48", "cache.page_size=8", "engine.chunk=8"))
    out = answers(engine, [request(str(i), p, max_tokens=2) for i, p in enumerate(work)])
    assert engine.metrics.preemptions == 0
    assert engine.metrics.computed_tokens == sum(len(p) + 1 for p in work) - engine.metrics.cached_tokens
    assert all(list(out[str(i)].token_ids) == greedy(LLAMA, p, 2) for i, p in enumerate(work))


def test_what_waits_for_a_prefix_is_not_looked_up_at_every_step(monkeypatch):
    shared = np.arange(3, 90)
    work = [np.append(shared, i) for i in range(3, 30)]
    engine = make_engine(overrides=("cache.page_size=8", "engine.chunk=8"))
    looked = []
    match = engine.cache.match
    monkeypatch.setattr(engine.cache, "match", lambda *given: looked.append(1) or match(*given))
    out = answers(engine, [request(str(i), p, max_tokens=2) for i, p in enumerate(work)])
    assert engine.metrics.cached_tokens == 80 * (len(work) - 1)
    assert len(looked) <= 2 * len(work)
    assert all(list(out[str(i)].token_ids) == greedy(LLAMA, p, 2) for i, p in enumerate(work))


def test_the_tightest_pool_that_can_hold_one_sequence_serves_all_in_turn():
    engine = make_engine(overrides=("cache.pages=9", "cache.page_size=8"))
    work = prompts(5, seed=5, low=10, high=24)
    out = answers(engine, [request(str(i), p[:30], max_tokens=64 - len(p[:30])) for i, p in enumerate(work)])
    assert all(
        list(out[str(i)].token_ids) == greedy(LLAMA, p[:30], 64 - len(p[:30])) for i, p in enumerate(work)
    )


def test_a_prompt_seen_before_goes_on_below_pages_of_its_own():
    """The last page of a repeated prompt is computed again; its twin in the tree belongs to nobody and may go."""
    engine = make_engine(overrides=("cache.page_size=8", "cache.pages=9"))
    prompt = np.arange(3, 27)
    long = np.concatenate([prompt, np.arange(30, 70)])
    for _ in range(3):
        out = answers(engine, [request("a", prompt, max_tokens=30)])
        assert list(out["a"].token_ids) == greedy(LLAMA, prompt, 30)
        (scored,) = engine.run([Request(id="s", prompt_ids=long.astype(np.int32), score=True)])
        assert scored.error is None
        engine.check_integrity()
