"""Which pages are chosen: the authors' two variants against plain numpy, and what ours promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_rows import (
    PagedRows,
    choose,
    chosen_sets,
    kernel_choice,
    lay_out,
    paper_choice,
)

from jaxinfer.attention import QuestPolicy, select_again
from jaxinfer.errors import ConfigError
from pallas_kernels.page_attention import page_attention

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 48, 49, 200)


def random_keys(rng, kind, length, heads, dim):
    shape = (length, heads, dim)
    if kind == "normal":
        return rng.standard_normal(shape).astype(np.float32)
    if kind == "ties":  # small whole numbers: sums are exact, and many pages score the same
        return rng.integers(-1, 2, shape).astype(np.float32)
    if kind == "all negative":
        return -rng.integers(1, 4, shape).astype(np.float32)
    return np.ones(shape, np.float32)  # all pages equal


def random_queries(rng, kind, rows, heads, dim):
    if kind == "normal":
        return rng.standard_normal((rows, heads, dim)).astype(np.float32)
    return rng.integers(-2, 3, (rows, heads, dim)).astype(np.float32)


jitted_attention = jax.jit(page_attention, static_argnames="scale")


def attend(rows: PagedRows, q, selection):
    args = (q, rows.k_pages, rows.v_pages, 0, selection.page_lists, selection.tokens)
    return jitted_attention(*args, scale=q.shape[-1] ** -0.5)


def softmax_attention(q, keys, values):
    """One row in float64: q [Hq, D], keys and values [kv, Hkv, D]."""
    group = q.shape[0] // keys.shape[1]
    keys, values = (np.repeat(a.astype(np.float64), group, axis=1) for a in (keys, values))
    scores = np.einsum("hd,khd->hk", q, keys) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(axis=-1, keepdims=True), values)


def tokens_of(pages, length, page_size):
    return np.concatenate([np.arange(p * page_size, min((p + 1) * page_size, length)) for p in pages])


@pytest.mark.parametrize("kind", ["normal", "ties", "all negative", "equal"])
@pytest.mark.parametrize("budget", [16, 32, 48, 64, 4096])
@pytest.mark.parametrize(("mode", "oracle"), [("paper", paper_choice), ("kernel", kernel_choice)])
def test_the_authors_page_sets(mode, oracle, budget, kind):
    rng = np.random.default_rng(budget)
    rows = lay_out([random_keys(rng, kind, n, 2, 8) for n in LENGTHS])
    q = random_queries(rng, kind, len(LENGTHS), 6, 8)
    got = chosen_sets(choose(QuestPolicy(token_budget=budget, mode=mode), rows, jnp.asarray(q)))
    for row, keys in enumerate(rows.keys):
        assert got[row] == oracle(q[row], keys, budget), f"{LENGTHS[row]} tokens"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=3, max_size=3),
    pages=st.integers(1, 9),
    mode=st.sampled_from(["paper", "kernel"]),
    kind=st.sampled_from(["normal", "ties", "all negative"]),
    seed=st.integers(0, 99),
)
def test_any_rows_of_the_authors_variants(lengths, pages, mode, kind, seed):
    rng = np.random.default_rng(seed)
    rows = lay_out([random_keys(rng, kind, n, 2, 8) for n in lengths], seed=seed, table_width=10)
    q = random_queries(rng, kind, 3, 4, 8)
    got = chosen_sets(choose(QuestPolicy(token_budget=16 * pages, mode=mode), rows, jnp.asarray(q)))
    oracle = {"paper": paper_choice, "kernel": kernel_choice}[mode]
    assert got == [oracle(q[row], keys, 16 * pages) for row, keys in enumerate(rows.keys)]


def shared_choice(policy, q, keys):
    """Ours in plain numpy: pages per KV head."""
    size, heads = policy.page_size, keys.shape[1]
    pages = [keys[at : at + size] for at in range(0, len(keys), size)]
    if len(keys) <= policy.dense_tokens:
        return [list(range(len(pages)))] * heads
    grouped = q.reshape(heads, -1, q.shape[-1])
    scores = [
        np.maximum(grouped * p.max(0)[:, None], grouped * p.min(0)[:, None]).sum(-1) for p in pages
    ]  # [P][Hkv, G]
    logits = np.array(scores, np.float64) * q.shape[-1] ** -0.5
    top = logits.max(axis=0)
    shares = (logits - top - np.log(np.exp(logits - top).sum(axis=0))).max(axis=-1)  # [P, Hkv]
    shares[: policy.first_pages] = shares[-policy.last_pages :] = np.inf
    count = policy.token_budget // size
    return [
        sorted(sorted(range(len(pages)), key=lambda p: -shares[p, head])[:count]) for head in range(heads)
    ]


@pytest.mark.parametrize("dense_below", [0, 100])
@pytest.mark.parametrize(("first", "last"), [(1, 2), (0, 1), (2, 3)])
def test_shared_choice(first, last, dense_below):
    rng = np.random.default_rng(3)
    policy = QuestPolicy(token_budget=96, first_pages=first, last_pages=last, dense_below=dense_below)
    rows = lay_out([rng.standard_normal((n, 2, 8)).astype(np.float32) for n in (*LENGTHS, 97, 100, 101, 400)])
    q = rng.standard_normal((len(rows.keys), 6, 8)).astype(np.float32)
    selection = choose(policy, rows, jnp.asarray(q))
    got = chosen_sets(selection)
    for row, keys in enumerate(rows.keys):
        assert got[row] == shared_choice(policy, q[row], keys), f"{len(keys)} tokens"
        for head, pages in enumerate(got[row]):
            assert int(selection.tokens[row, head]) == len(tokens_of(pages, len(keys), 16))
            if len(keys) > policy.dense_tokens:
                assert len(pages) * 16 == policy.token_budget
                assert set(range(first)) <= set(pages) and len(set(pages)) == len(pages)
                assert set(pages[-last:]) == set(range(-(-len(keys) // 16) - last, -(-len(keys) // 16)))


@pytest.mark.parametrize("mode", ["shared", "kernel", "paper"])
def test_attention_is_that_over_the_chosen_tokens(mode):
    rng = np.random.default_rng(4)
    keys, values = ([rng.standard_normal((n, 2, 16)).astype(np.float32) for n in LENGTHS] for _ in range(2))
    rows = lay_out(keys, values)
    q = rng.standard_normal((len(LENGTHS), 6, 16)).astype(np.float32)
    selection = choose(QuestPolicy(token_budget=64, mode=mode), rows, jnp.asarray(q))
    got = np.asarray(attend(rows, jnp.asarray(q), selection))
    group = 6 // selection.number.shape[1]
    for row, lists in enumerate(chosen_sets(selection)):
        for h in range(6):
            tokens = tokens_of(lists[h // group], LENGTHS[row], 16)
            mine = slice(h // 3, h // 3 + 1)
            want = softmax_attention(q[row, h : h + 1], keys[row][tokens, mine], values[row][tokens, mine])
            np.testing.assert_allclose(got[row, h : h + 1], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["shared", "kernel"])
def test_a_budget_no_smaller_than_the_text_is_dense(mode):
    rng = np.random.default_rng(5)
    keys, values = ([rng.standard_normal((n, 2, 16)).astype(np.float32) for n in LENGTHS] for _ in range(2))
    rows = lay_out(keys, values)
    q = rng.standard_normal((len(LENGTHS), 6, 16)).astype(np.float32)
    got = attend(rows, jnp.asarray(q), choose(QuestPolicy(token_budget=208, mode=mode), rows, jnp.asarray(q)))
    for row in range(len(LENGTHS)):
        want = softmax_attention(q[row], keys[row], values[row])
        np.testing.assert_allclose(got[row], want, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 200), mode=st.sampled_from(["shared", "kernel", "paper"]), seed=st.integers(0, 99)
)
def test_neither_batch_mates_nor_the_order_of_pages_matter(length, mode, seed):
    """Bit for bit, the output too."""
    rng = np.random.default_rng(seed)
    policy = QuestPolicy(token_budget=64, mode=mode)
    keys = [rng.standard_normal((n, 2, 16)).astype(np.float32) for n in (77, length, 130)]
    q = jnp.asarray(rng.standard_normal((3, 4, 16)), jnp.float32)
    together, shuffled = (lay_out(keys, seed=s, table_width=13) for s in (seed, seed + 1))
    alone = lay_out(keys[1:2], seed=seed + 2, table_width=13)
    want = choose(policy, together, q)
    for rows, queries, row in ((shuffled, q, 1), (alone, q[1:2], 0)):
        got = choose(policy, rows, queries)
        assert chosen_sets(got)[row] == chosen_sets(want)[1]
        np.testing.assert_array_equal(
            attend(rows, queries, got)[row], attend(together, q, want)[1], strict=True
        )


def test_an_adaptive_budget_takes_few_pages_where_few_matter():
    rng = np.random.default_rng(6)
    sharp = rng.standard_normal((400, 1, 16)).astype(np.float32) * 0.01
    sharp[160:176] = 20  # one page takes all attention of a positive query
    flat = rng.standard_normal((400, 1, 16)).astype(np.float32) * 0.01
    rows = lay_out([sharp, flat, flat[:100]])
    q = jnp.ones((3, 2, 16))
    chosen = choose(QuestPolicy(token_budget=256, top_p=0.9), rows, q)
    assert chosen_sets(chosen)[0] == [[0, 10, 23, 24]]
    assert np.asarray(chosen.number).tolist() == [[4], [16], [7]]
    assert np.asarray(chosen.tokens).tolist() == [[64], [256], [100]]


def test_without_spread_pages_rank_by_the_middle_of_their_keys():
    rng = np.random.default_rng(8)
    keys = rng.standard_normal((160, 1, 16)).astype(np.float32) * 0.1
    keys[32:48] += 0.5  # all of this page points where the query does
    keys[64:80] *= 40  # this one points everywhere
    rows, q = lay_out([keys]), jnp.ones((1, 1, 16))
    policies = [QuestPolicy(token_budget=64, spread=spread) for spread in (0.0, 1.0)]
    middle, bound = (chosen_sets(choose(policy, rows, q))[0][0] for policy in policies)
    assert (middle, bound) == ([0, 2, 8, 9], [0, 4, 8, 9])


def test_a_choice_that_serves_again_follows_the_end_of_the_text():
    rng = np.random.default_rng(7)
    policy = QuestPolicy(token_budget=96, reuse_steps=8)
    keys = [rng.standard_normal((n, 2, 8)).astype(np.float32) for n in (399, 400, 95, 96, 0)]
    rows = lay_out(keys, table_width=30)
    q = jnp.asarray(rng.standard_normal((5, 4, 8)), jnp.float32)
    before = choose(policy, rows, q)
    again = select_again(policy, before, rows.page_table, rows.kv_len)
    for a, b in zip(again[:2], before[:2]):
        np.testing.assert_array_equal(a, b)
    assert chosen_sets(again) == chosen_sets(before)
    grown = select_again(policy, before, rows.page_table, rows.kv_len + jnp.array([2, 2, 2, 2, 0]))
    for head in range(2):
        for row in (0, 1):
            assert chosen_sets(grown)[row][head] == [*chosen_sets(before)[row][head][:-2], 24, 25]
        assert chosen_sets(grown)[2][head] == [0, 1, 2, 3, 5, 6]
        assert np.asarray(grown.tokens)[:, head].tolist() == [81, 82, 81, 82, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token_budget": 100}, "token_budget = 100.*multiple of the page size 16"),
        ({"token_budget": 48}, "token_budget = 48.*at least 64"),
        ({"token_budget": -16, "mode": "kernel"}, "token_budget = -16"),
        ({"page_size": 0}, "page_size = 0"),
        ({"mode": "best"}, "mode = 'best'.*shared, kernel, paper"),
        ({"last_pages": 0}, "last_pages = 0"),
        ({"top_p": 0.0}, r"top_p = 0.0.*\(0, 1\]"),
        ({"mode": "paper", "reuse_steps": 2}, "reuse_steps = 2: expected 1 in mode 'paper'"),
        ({"reuse_steps": 0}, "reuse_steps = 0"),
        ({"spread": 1.5}, r"spread = 1.5.*\[0, 1\]"),
        ({"bounds": "int2"}, "bounds = 'int2'.*auto, bfloat16, int8"),
        ({"mode": "paper", "bounds": "int8"}, "bounds = 'int8': expected 'auto' in mode 'paper'"),
        ({"mode": "kernel", "spread": 0.5}, "spread = 0.5: expected 1 in mode 'kernel'"),
    ],
)
def test_impossible_policies_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        QuestPolicy(**{"token_budget": 256, **wrong})
