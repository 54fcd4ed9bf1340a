"""Beam search in the engine, against the oracle over scores of whole sequences: pages, forks, copies, preemption, company."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beam_oracle import beam_search
from helpers import (
    LLAMA,
    MIXTRAL,
    answers,
    dense_logits,
    greedy,
    make_engine,
    prompts,
    request,
    variant,
    weights,
)

from jaxinfer.core import Request
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.step import copy_pages
from jaxinfer.kvcache.pool import make_pool, page_bytes
from jaxinfer.models import unstack

RULES = (
    {"beam_width": 2, "max_tokens": 12},
    {"beam_width": 4, "n": 4, "max_tokens": 9, "stop_token_ids": tuple(range(3, 20)), "length_penalty": 0.0},
    {"beam_width": 3, "n": 2, "max_tokens": 14, "stop_token_ids": (5, 6, 7, 8), "early_stopping": True},
    {"beam_width": 5, "n": 1, "max_tokens": 8, "stop_token_ids": tuple(range(50, 97)), "min_tokens": 4},
    {"beam_width": 2, "n": 2, "max_tokens": 1},
    {"beam_width": 3, "n": 3, "max_tokens": 20, "length_penalty": -1.0, "early_stopping": "never", "ignore_eos": False},
)  # fmt: skip


# One shape for most of the engines here, so that they share their compiled programs.
BASE = ("engine.max_tokens_per_step=16", "cache.page_size=8", "cache.pages=40")


@functools.cache
def dense(config, tokens: tuple[int, ...]) -> np.ndarray:
    return log_softmax(dense_logits(config, tokens)[-1])


def log_softmax(logits) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))


def oracle(scores, prompt, sampling):
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(LLAMA.eos_ids))
    found = beam_search(
        scores,
        [int(token) for token in prompt],
        width=sampling.beam_width,
        most=sampling.max_tokens,
        stops=stops,
        fewest=sampling.min_tokens,
        length_penalty=sampling.length_penalty,
        early_stopping=sampling.early_stopping,
    )
    return [(tokens, "stop" if tokens[-1] in stops else "length") for _, tokens in found[: sampling.n]]


def check(completion, one: Request, scores) -> None:
    assert completion.error is None
    found = [(list(choice.token_ids), choice.finish_reason) for choice in completion.choices]
    assert found == oracle(scores, one.prompt_ids, one.sampling), one.id
    assert completion.usage.completion_tokens == sum(len(tokens) for tokens, _ in found)


def mixed(count: int, seed: int = 0, **changes) -> list[Request]:
    """Every third request is greedy, the others search."""
    out = []
    for index, prompt in enumerate(prompts(count, seed=seed)):
        rules = {"max_tokens": 15} if index % 3 == 2 else RULES[index % len(RULES)]
        out.append(request(str(index), prompt, **rules | changes))
    return out


def check_all(config, out, requests) -> None:
    for one in requests:
        if one.sampling.beam_width > 1:
            check(out[one.id], one, lambda tokens: dense(config, tuple(tokens)))
        else:
            assert list(out[one.id].token_ids) == greedy(config, one.prompt_ids, one.sampling.max_tokens)


@pytest.mark.parametrize(
    "overrides",
    [(), ("engine.chunk=5", "cache.prefix_sharing=false"), ("schedule.policy=longest-prefix",)],
    ids=lambda each: ",".join(each),
)
def test_answers_equal_the_oracle_in_any_company(overrides):
    engine = make_engine(overrides=(*BASE, *overrides))
    work = mixed(9)
    for _ in range(2):  # the second time with prefix hits
        check_all(LLAMA, answers(engine, work), work)
    assert (engine.metrics.cached_tokens > 0) == ("cache.prefix_sharing=false" not in overrides)


def test_a_mixture_of_experts():
    work = mixed(4, seed=7)
    check_all(MIXTRAL, answers(make_engine(MIXTRAL, BASE), work), work)


@pytest.mark.parametrize("sharing", ["true", "false"])
def test_a_pool_too_small_preempts_whole_searches_and_answers_the_same(sharing):
    changes = {"max_tokens": 60, "stop_token_ids": (), "min_tokens": 0}
    work = [
        request(str(i), prompt, **changes, **({"beam_width": 3, "n": 3} if i % 2 else {}))
        for i, prompt in enumerate(prompts(6, seed=4, low=20, high=30))
    ]
    engine = make_engine(overrides=(*BASE, f"cache.prefix_sharing={sharing}"))
    check_all(LLAMA, answers(engine, work), work)
    assert engine.metrics.preemptions > 0


def test_the_tightest_pool_that_can_hold_a_search_serves_all_in_turn():
    work = [request(str(i), np.arange(3 + i, 23 + i), beam_width=4, n=4, max_tokens=20) for i in range(3)]
    tight = make_engine(overrides=(*BASE, "cache.pages=15"))  # 2 shared, 3 for each of 4 beams
    check_all(LLAMA, answers(tight, work), work)
    tighter = make_engine(overrides=(*BASE, "cache.pages=14"))
    (out,) = tighter.run(work[:1])
    assert out.error.code == "kv_pool_exceeded" and "14 pages; the KV pool has 13" in str(out.error)


def test_out_of_memory_starts_searches_again(monkeypatch):
    engine = make_engine(overrides=BASE)
    real, calls = engine.device._programs.decode, []

    def decode(weights, state, *given, **static):
        calls.append(1)
        if len(calls) in (4, 9):
            jax.tree.map(lambda leaf: leaf.delete(), state)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        return real(weights, state, *given, **static)

    monkeypatch.setattr(engine.device._programs, "decode", decode)
    work = [request(str(i), p, beam_width=4, n=4, max_tokens=12) for i, p in enumerate(prompts(2, seed=8))]
    check_all(LLAMA, answers(engine, work), work)
    assert engine.metrics.shrinks == 2 and engine.planner.max_running < 4  # a search runs whole all the same


def test_beams_share_the_pages_of_their_prompt_and_copy_one_page_each():
    prompt, width, new = prompts(1, seed=3, low=163, high=164)[0], 4, 20
    engine = make_engine(overrides=BASE)
    copied, launch = [], engine.device.launch

    def counting(plan):
        copied.append(len(plan.copies))
        assert len({target for _, target in plan.copies}) == len(plan.copies)
        return launch(plan)

    engine.device.launch = counting
    work = [request("a", prompt, beam_width=width, max_tokens=new)]
    check_all(LLAMA, answers(engine, work), work)
    whole, own = len(prompt) // 8, -(-(len(prompt) % 8 + new) // 8)
    assert engine.metrics.peak_pages <= whole + width * own
    assert max(copied) <= width - 1 and sum(copied) == engine.metrics.copied_pages
    assert 20 * sum(copied) < new * width * whole  # what copying whole caches would take


def test_a_second_run_compiles_nothing():
    engine = make_engine(overrides=BASE)
    answers(engine, mixed(6))
    before = engine.metrics.compilations, copy_pages._cache_size()
    answers(engine, mixed(6))
    assert (engine.metrics.compilations, copy_pages._cache_size()) == before


def test_a_wide_search_asks_the_device_for_more_candidates():
    work = [
        request("wide", np.arange(3, 20), beam_width=8, n=8, max_tokens=5, stop_token_ids=tuple(range(30, 60))),
        request("greedy", np.arange(9, 30), logprobs=20),
    ]  # fmt: skip
    out = answers(make_engine(overrides=BASE), work)
    check_all(LLAMA, out, work)
    assert all(len(entry.top) == 20 for entry in out["greedy"].logprobs)


def test_log_probabilities_of_answers():
    prompt = np.arange(7, 33)
    out = answers(
        make_engine(overrides=BASE), [request("a", prompt, beam_width=3, n=2, max_tokens=6, logprobs=4)]
    )["a"]
    for choice in out.choices:
        tokens = prompt.tolist()
        assert [entry.token_id for entry in choice.logprobs] == list(choice.token_ids)
        for entry in choice.logprobs:
            expected = dense(LLAMA, tuple(tokens))
            assert [index for index, _ in entry.top] == np.argsort(-expected)[:4].tolist()
            assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-4)
            tokens.append(entry.token_id)


SPARSE = ("sparsity.token_budget=40", "sparsity.dense_layers=1", "sparsity.prompt_tail=1000"
)  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        (*SPARSE, "sparsity.reuse_steps=3", "sparsity.bounds=int8"),
        ("cache.dtype=int8",),
        (*SPARSE, "cache.dtype=int4"),
    ],
    ids=["quest-reuse-int8-bounds", "int8", "quest-int4"],
)
def test_bounds_choices_and_packed_pages_go_with_the_beams(overrides):
    """The oracle asks an engine of the same settings for one token after each hypothesis: every token past the budget, prompt
    or not, is computed by itself, so prompts and answers are the same to it."""
    alone = make_engine(overrides=(*BASE, *overrides, "cache.prefix_sharing=false"))

    def scores(tokens):
        (out,) = alone.run([request("x", tokens, max_tokens=1, logprobs=20)])
        logprobs = np.full(LLAMA.vocab_size, -np.inf, np.float32)
        for index, value in out.logprobs[0].top:
            logprobs[index] = value
        return logprobs

    engine = make_engine(overrides=(*BASE, *overrides))
    work = [
        request(str(i), p, beam_width=3, n=3, max_tokens=9)
        for i, p in enumerate(prompts(2, seed=11, low=42, high=46))
    ]
    out = answers(engine, work)
    for one in work:
        check(out[one.id], one, scores)
    assert engine.metrics.copied_pages > 0


@pytest.mark.parametrize(
    "dtype, bounds", [("float32", None), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "bfloat16")]
)
def test_a_page_is_copied_with_its_bounds_and_nothing_else_changes(dtype, bounds):
    pages = 12
    pool = make_pool(variant(layers=3), pages, 8, dtype, bounds)
    draw = np.random.default_rng(5)
    pool = jax.tree.map(lambda leaf: jnp.asarray(draw.integers(0, 99, leaf.shape), leaf.dtype), pool)
    before = [np.array(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(pool)]
    pairs = np.array([[3, 5, 3, pages], [5, 7, 8, pages]], np.int32)
    memory = copy_pages.lower(pool, pairs).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(pool))  # in place
    assert memory.temp_size_in_bytes < 5 * page_bytes(
        variant(layers=3), 8, dtype, bounds
    )  # and through four pages
    after = jax.tree.leaves(copy_pages(pool, pairs))
    for old, new in zip(before, after, strict=True):
        expected = old.copy()
        expected[:, [5, 7, 8]] = old[:, [3, 5, 3]]  # all are read before one is written
        np.testing.assert_array_equal(np.array(new.astype(jnp.float32)), expected)


def test_scores_that_are_no_numbers_fail_the_search_alone():
    model = unstack(weights(LLAMA), LLAMA)
    model.embed = model.embed.at[96].set(np.nan)
    engine = Engine(LLAMA, model, make_engine(overrides=BASE).settings)
    out = answers(
        engine,
        [request("bad", [5, 96, 7], beam_width=3), request("good", [8, 9, 10], beam_width=2, max_tokens=3)],
    )
    assert out["bad"].error.code == "model_failure" and not out["bad"].choices
    assert out["good"].error is None and len(out["good"].token_ids) == 3


def test_what_cannot_be_served_says_why():
    engine = make_engine(overrides=BASE)
    (out,) = engine.run([request("a", [3, 4], beam_width=9)])
    assert out.error.code == "invalid_value"
    assert "beam_width: 9 beams are more than the 8 sequences" in str(out.error)
