"""The shape of a batch against a prefix tree of plain dictionaries."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.schedule.workload import POLICIES, Sharing, Workload


def workload(prompts):
    lengths = [len(prompt) for prompt in prompts]
    return Workload(
        tokens=np.asarray([token for prompt in prompts for token in prompt], np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        answer_limits=np.ones(len(prompts), np.int64),
    )


def chains(prompts, page_size):
    """The tree node of every whole page before a prompt's last token, as the tuple of tokens from the root."""
    return [
        [
            tuple(prompt[: end + page_size])
            for end in range(0, max(len(prompt) - 1, 0) // page_size * page_size, page_size)
        ]
        for prompt in prompts
    ]


prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=30)


@settings(max_examples=300, deadline=None)
@given(prompts_of_few_tokens, st.sampled_from([1, 2, 3]))
def test_shared_tokens_are_pages_that_an_earlier_prompt_has(prompts, page_size):
    paths = chains(prompts, page_size)
    nodes = {node for path in paths for node in path}
    expected = (sum(map(len, paths)) - len(nodes)) * page_size
    assert Sharing.of(workload(prompts), page_size).shared_tokens == expected


@settings(max_examples=300, deadline=None)
@given(prompts_of_few_tokens, st.sampled_from([1, 2, 3]))
def test_depth_first_order_keeps_every_subtree_together(prompts, page_size):
    sharing = Sharing.of(workload(prompts), page_size)
    order = POLICIES["dfs"](sharing)
    assert sorted(order) == list(range(len(prompts)))
    paths = chains(prompts, page_size)
    for node in {node for path in paths for node in path}:
        places = [place for place, index in enumerate(order) if node in paths[index]]
        assert places == list(range(places[0], places[0] + len(places)))
    common = [0] + [
        len(set(paths[a]) & set(paths[b])) for a, b in pairwise(np.argsort(sharing.rank, kind="stable"))
    ]
    assert list(sharing.common) == common[: len(prompts)]
    assert list(POLICIES["fcfs"](sharing)) == list(range(len(prompts)))


def test_long_prompts_over_many_pieces(monkeypatch):
    monkeypatch.setattr("jaxinfer.schedule.workload._ROWS_AT_ONCE", 7)
    random = np.random.default_rng(0)
    heads = random.integers(0, 1 << 30, (5, 64))
    prompts = [[*heads[i % 5][: 16 * (i % 4 + 1)], *random.integers(0, 1 << 30, i % 40)] for i in range(100)]
    paths = chains(prompts, 16)
    nodes = {node for path in paths for node in path}
    assert Sharing.of(workload(prompts), 16).shared_tokens == (sum(map(len, paths)) - len(nodes)) * 16


@pytest.mark.parametrize("mapped", [False, True])
def test_tokens_may_be_a_mapped_file(tmp_path, mapped):
    plain = workload([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 9]])
    if mapped:
        plain.tokens.tofile(tmp_path / "tokens")
        tokens = np.memmap(tmp_path / "tokens", np.int32, "r")
        plain = Workload(tokens=tokens, starts=plain.starts, answer_limits=plain.answer_limits)
    sharing = Sharing.of(plain, 2)
    assert sharing.shared_tokens == 6 and list(plain.prompt(1)) == [1, 2, 3, 4, 6]
    assert Sharing.none(plain).shared_tokens == 0
