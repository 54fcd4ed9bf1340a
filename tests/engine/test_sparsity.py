"""Quest inside the engine: against dense attention under a mask of brute-force chosen pages, whatever the batch."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import LLAMA, MIXTRAL, answers, greedy, make_engine, request, variant, weights

from jaxinfer.config import load_config
from jaxinfer.core import Request
from jaxinfer.engine.engine import Engine
from jaxinfer.errors import ConfigError
from jaxinfer.models import forward, logits, unstack
from pallas_kernels.hybrid_attention import hybrid_attention

PAGE, BUDGET = 8, 40
DEEP = variant(layers=2)
SPARSE = (f"cache.page_size={PAGE}", f"sparsity.token_budget={BUDGET}", "sparsity.dense_layers=1")


def rounded_down(x):
    """To bfloat16, as the pool keeps bounds."""
    near = x.astype(np.float32).astype(ml_dtypes.bfloat16)
    below = np.nextafter(near, ml_dtypes.bfloat16(-np.inf))
    return np.where(near.astype(np.float64) <= x, near, below).astype(np.float64)


def in_eight_bits(low, high):
    """Bounds [pages, D] rounded outward to whole multiples, at most 127, of a power of two for each page."""
    largest = np.maximum(np.abs(low), np.abs(high)).max(axis=1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(largest / 127))
    return np.floor(low / scale) * scale, np.ceil(high / scale) * scale


def in_bfloat16(low, high):
    return rounded_down(low), -rounded_down(-high)


def chosen_pages(q, keys, group, rounded=in_bfloat16):
    """Pages of one row and KV head under mode "shared": q [G, D], keys [tokens, D] -> sorted positions."""
    pages = -(-len(keys) // PAGE)
    if len(keys) <= BUDGET:
        return list(range(pages))
    split = [keys[i * PAGE : (i + 1) * PAGE] for i in range(pages)]
    low, high = np.stack([p.min(0) for p in split]), np.stack([p.max(0) for p in split])
    low, high = rounded(low, high)
    scores = np.maximum(q[:, None] * low, q[:, None] * high).sum(-1) / math.sqrt(q.shape[-1])
    shifted = scores - scores.max(1, keepdims=True)
    rank = (shifted - np.log(np.exp(shifted).sum(1, keepdims=True))).max(0)
    forced = [0, pages - 2, pages - 1]
    rest = sorted(set(range(pages)) - set(forced), key=lambda p: (-rank[p], p))
    return sorted(forced + rest[: BUDGET // PAGE - len(forced)])


def reused(pages, at, now):
    """What the token `at` chose, as the token `now` sees it: the last two pages are those of `now`."""
    if at < BUDGET:
        return list(range(now // PAGE + 1))
    return [*pages[:-2], now // PAGE - 1, now // PAGE]


def attend_sparsely(dense_tokens, dense_layers, reuse_steps, rounded):
    """`attend` over a whole sequence: tokens from dense_tokens on see only the pages that they choose, or that the
    last of them to choose did."""

    def attend(cache, layer, q, k, v, window):
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        group, out = q.shape[1] // k.shape[1], np.zeros(q.shape)
        for t in range(len(q)):
            for head in range(k.shape[1]):
                of_head = slice(head * group, (head + 1) * group)
                seen = np.arange(t + 1)
                if t >= dense_tokens and layer >= dense_layers:
                    at = t - (t - dense_tokens) % reuse_steps
                    pages = reused(chosen_pages(q[at, of_head], k[: at + 1, head], group, rounded), at, t)
                    seen = np.asarray([i for i in seen if i // PAGE in pages])
                scores = q[t, of_head] @ k[seen, head].T / math.sqrt(q.shape[-1])
                shares = np.exp(scores - scores.max(1, keepdims=True))
                out[t, of_head] = shares / shares.sum(1, keepdims=True) @ v[seen, head]
        return jnp.asarray(out, jnp.float32), cache

    return attend


def sparse_logits(config, tokens, dense_tokens, reuse_steps=1, rounded=in_bfloat16):
    """float32 [T, V]."""
    model, at = unstack(weights(config), config), jnp.arange(len(tokens))
    attend = attend_sparsely(dense_tokens, 1, reuse_steps, rounded)
    hidden, _ = forward(model, config, jnp.asarray(tokens, jnp.int32), at, at + 1, attend, None)
    return np.asarray(logits(model, config, hidden))


def prompts(count, seed, low=50, high=90):
    random = np.random.default_rng(seed)
    return [random.integers(3, 97, random.integers(low, high)) for _ in range(count)]


@pytest.mark.parametrize(
    ("config", "reuse_steps"),
    [(DEEP, 1), (MIXTRAL, 1), (DEEP, 3), pytest.param(MIXTRAL, 11, marks=pytest.mark.slow)],
    ids=["llama", "mixtral", "llama-reuse", "mixtral-reuse"],
)
def test_answers_are_those_of_attention_to_the_chosen_pages(config, reuse_steps):
    engine = make_engine(config, (*SPARSE, f"sparsity.reuse_steps={reuse_steps}"))
    for prompt in prompts(2, seed=1, high=70):
        out = answers(engine, [request("a", prompt, max_tokens=12)])["a"].token_ids
        whole = np.concatenate([prompt, out])
        expected = sparse_logits(config, whole, len(prompt), reuse_steps)[len(prompt) - 1 : -1]
        assert list(out) == expected.argmax(-1).tolist()


def test_it_is_not_what_dense_attention_says():
    work = prompts(6, seed=2)
    dense = answers(make_engine(DEEP), [request(str(i), p, max_tokens=20) for i, p in enumerate(work)])
    few = answers(make_engine(DEEP, SPARSE), [request(str(i), p, max_tokens=20) for i, p in enumerate(work)])
    assert any(dense[name].token_ids != few[name].token_ids for name in dense)


@pytest.mark.parametrize("budget", [128, pytest.param(256, marks=pytest.mark.slow), 4096])
def test_a_budget_that_holds_everything_is_dense_attention(budget, caplog):
    work = prompts(4, seed=3)
    engine = make_engine(LLAMA, (f"sparsity.token_budget={budget}",))
    out = answers(engine, [request(str(i), p, max_tokens=20) for i, p in enumerate(work)])
    assert all(list(out[str(i)].token_ids) == greedy(LLAMA, p, 20) for i, p in enumerate(work))
    assert ("attention is dense" in caplog.text) == (budget >= 256)


@pytest.mark.parametrize(
    ("tail", "reuse_steps", "bounds"),
    [
        pytest.param(0, 1, "auto", marks=pytest.mark.slow),
        pytest.param(5, 1, "int8", marks=pytest.mark.slow),
        pytest.param(0, 3, "int8", marks=pytest.mark.slow),
        (1000, 7, "auto"),
    ],
)
def test_answers_do_not_depend_on_batch_chunks_hits_or_preemption(tail, reuse_steps, bounds):
    shared = prompts(1, seed=4, low=60, high=61)[0]
    work = [np.concatenate([shared, p[:20]]) for p in prompts(5, seed=5)] + prompts(3, seed=6)
    settings = (*SPARSE, f"sparsity.prompt_tail={tail}", f"sparsity.reuse_steps={reuse_steps}")
    settings = (*settings, f"sparsity.bounds={bounds}")
    alone = {}
    for i, p in enumerate(work):
        engine = make_engine(DEEP, settings)
        alone |= {i: answers(engine, [request("a", p, max_tokens=24)])["a"].token_ids}
    for more in [
        (),
        ("engine.chunk=7", "engine.decode_steps=5"),
        ("cache.prefix_sharing=false",),
        ("cache.pages=36",),
    ]:
        engine = make_engine(DEEP, (*settings, *more))
        for _ in range(2):  # the second time on what the first has left in the cache
            out = answers(engine, [request(str(i), p, max_tokens=24) for i, p in enumerate(work)])
            assert {i: out[str(i)].token_ids for i in alone} == alone, more
        if "cache.pages=36" in more:
            assert engine.metrics.preemptions > 0
        if not more and tail < 20:
            assert engine.metrics.cached_tokens > 0


@pytest.mark.parametrize(
    ("reuse_steps", "bounds", "rounded"),
    [
        (1, "auto", in_bfloat16),
        pytest.param(4, "bfloat16", in_bfloat16, marks=pytest.mark.slow),
        (1, "int8", in_eight_bits),
    ],
)
def test_the_tail_of_a_prompt_chooses_pages_and_is_scored_so(reuse_steps, bounds, rounded):
    prompt = prompts(1, seed=8, low=80, high=81)[0]
    tail, reuse = "sparsity.prompt_tail=30", f"sparsity.reuse_steps={reuse_steps}"
    engine = make_engine(DEEP, (*SPARSE, tail, reuse, f"sparsity.bounds={bounds}"))
    scored = Request(id="s", prompt_ids=prompt.astype(np.int32), score=True)
    out = answers(engine, [scored, request("b", prompt[:70])])["s"].prompt_logprobs
    expected = sparse_logits(DEEP, prompt, 50, reuse_steps, rounded)
    expected = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    np.testing.assert_allclose(out, expected[np.arange(len(prompt) - 1), prompt[1:]], atol=2e-4)


@pytest.mark.parametrize(
    "config, reuse_steps",
    [
        pytest.param(variant(layers=4), 1, marks=pytest.mark.slow),
        (variant(layers=4), 4),
        pytest.param(variant(layers=5, windows=(0, 20, 0, 20, 0)), 1, marks=pytest.mark.slow),
    ],
    ids=["1", "4", "windows-between"],
)
def test_stacked_layers_choose_as_unrolled_ones(config, reuse_steps):
    work = prompts(3, seed=9)
    sparse = (*SPARSE, f"sparsity.reuse_steps={reuse_steps}")
    settings = load_config(None, ["engine.max_seqs=8", "engine.max_tokens_per_step=32", *sparse])
    stacked = Engine(config, weights(config), settings)
    requests = [request(str(i), p, max_tokens=12) for i, p in enumerate(work)]
    one, other = answers(stacked, requests), answers(make_engine(config, sparse), requests)
    assert {k: v.token_ids for k, v in one.items()} == {k: v.token_ids for k, v in other.items()}


@pytest.mark.parametrize("mode", ["paper", "kernel"])
def test_the_authors_modes_run(mode):
    settings = (f"cache.page_size={PAGE}", f"sparsity.token_budget={BUDGET}", f"sparsity.mode={mode}")
    work = prompts(3, seed=10)
    requests = [request(str(i), p, max_tokens=12) for i, p in enumerate(work)]
    together = answers(make_engine(DEEP, settings), requests)
    for each in requests:
        assert answers(make_engine(DEEP, settings), [each])[each.id].token_ids == together[each.id].token_ids


@pytest.mark.parametrize(
    "text, said",
    [
        ("sparsity.token_budget=30", "multiple of the page size 8"),
        ("sparsity.token_budget=1001", "multiple of the page size 8"),
        ("sparsity.token_budget=16", "at least 32"),
        ("sparsity.first_pages=9", "at least 96"),
        ("sparsity.bounds=int3", "bounds = 'int3' is not accepted"),
        ("sparsity.reuse_steps=0", "reuse_steps = 0 is not accepted"),
    ],
)
def test_impossible_budgets_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        make_engine(DEEP, (*SPARSE, text))


@pytest.mark.parametrize(
    "settings", [(), SPARSE, (*SPARSE, "sparsity.reuse_steps=3")], ids=["dense", "quest", "reuse"]
)
def test_decoding_rows_apart_as_on_a_gpu_give_the_same(settings, monkeypatch):
    work = prompts(4, seed=12)
    requests = [request(str(i), p, max_tokens=12) for i, p in enumerate(work)]
    together = answers(make_engine(DEEP, settings), requests)
    monkeypatch.setattr("jaxinfer.engine.paged._decodes_apart", lambda config: True)
    other = (*settings, "engine.decode_steps=7")  # programs of its own
    apart = answers(make_engine(DEEP, other), requests)
    assert {k: v.token_ids for k, v in together.items()} == {k: v.token_ids for k, v in apart.items()}


@pytest.mark.parametrize("settings", [(), SPARSE], ids=["dense", "quest"])
def test_one_launch_for_both_kinds_of_rows_gives_the_same(settings, monkeypatch):
    requests = [request(str(i), p, max_tokens=12) for i, p in enumerate(prompts(4, seed=12))]
    together = answers(make_engine(DEEP, settings), requests)
    asked = []

    def spy(*args, implementation, **kwargs):
        asked.append(implementation)
        return hybrid_attention(*args, implementation=implementation, **kwargs)

    monkeypatch.setattr("jaxinfer.engine.paged._decodes_apart", lambda config: True)
    monkeypatch.setattr("jaxinfer.engine.paged.hybrid_attention", spy)
    for number, (overlap, wanted) in enumerate({"on": None, "off": "xla"}.items()):
        other = (*settings, f"engine.overlap={overlap}", f"engine.decode_steps={5 + number}")
        beside = answers(make_engine(DEEP, other), requests)
        assert {k: v.token_ids for k, v in together.items()} == {k: v.token_ids for k, v in beside.items()}
        assert set(asked) == {wanted}
        asked.clear()


def test_nothing_is_compiled_after_warm_up():
    engine = make_engine(DEEP, (*SPARSE, "engine.max_seqs=2", "engine.max_tokens_per_step=16"))
    engine.warm_up()
    before = engine.metrics.compilations
    answers(engine, [request(str(i), p, max_tokens=12) for i, p in enumerate(prompts(4, seed=11))])
    assert engine.metrics.compilations == before
