"""The order for two cursors: sorted, split by the paper's rule, and nothing shared given away."""

import numpy as np
import pytest
from batches import COST, workload
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.schedule.lengths import Expected, expect, sample
from jaxinfer.schedule.partition import partition
from jaxinfer.schedule.plan import make_plan, split
from jaxinfer.schedule.tree import RequestTree

batches = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(0, 40)), max_size=30
)


def planned(batch, keep=0.99):
    prompts, outputs = [p for p, _ in batch], np.array([o for _, o in batch], np.int64)
    tree = RequestTree.of(workload(prompts), 2)
    return make_plan(tree, COST, outputs, keep=keep), prompts, outputs


@settings(max_examples=200, deadline=None)
@given(batches, st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_plan_is_sorted_whole_and_keeps_what_is_shared(batch, keep):
    plan, prompts, _ = planned(batch, keep)
    assert sorted(plan.order) == list(range(len(batch)))
    assert list(plan.starts) == sorted(set(plan.starts)) or not batch
    assert plan.starts[0] == 0 and plan.starts[-1] == len(batch)
    computed = len_computed(plan, prompts)
    total = sum(map(len, prompts))
    assert total - computed >= plan.shared_tokens >= keep * plan.tree.shared_tokens - 1e-9


def len_computed(plan, prompts, page_size=2):
    """Prompt tokens computed when only what the request before had is still there."""
    computed = 0
    before: list[int] = []
    for index in plan.order:
        prompt, common = prompts[index], 0
        for end in range(page_size, min(len(prompt), len(before) + page_size), page_size):
            if prompt[:end] == before[:end] and end < len(prompt) and end < len(before):
                common = end
        computed += len(prompt) - common
        before = prompt
    return computed


@settings(max_examples=200, deadline=None)
@given(batches, st.floats(0, 200))
def test_split_follows_the_published_rule(batch, budget):
    tree = RequestTree.of(workload([p for p, _ in batch]), 2)

    def visit(node, t):
        nodes = [n for n in range(1, len(tree.parent)) if tree.parent[n] == node]
        leaves = [r for r in range(len(batch)) if tree.attach[r] == node]
        children = len(nodes) + len(leaves)
        if tree.depth[node] * children > t:
            return [node], []
        whole, alone = [], list(leaves)
        for child in nodes:
            below = visit(child, t / children)
            whole += below[0]
            alone += below[1]
        return whole, alone

    whole, alone = split(tree, budget)
    expected = visit(0, budget)
    assert sorted(whole) == sorted(expected[0]) and sorted(alone) == sorted(expected[1])


@settings(max_examples=100, deadline=None)
@given(batches)
def test_units_of_single_requests_descend_in_density(batch):
    plan, _, outputs = planned([([i, *p], o) for i, (p, o) in enumerate(batch)])  # nothing is shared
    each = plan.tree.requests(COST, outputs).density[plan.order]
    assert list(each) == sorted(each, reverse=True)


def test_long_answers_hidden_among_short_ones_come_out():
    shared = list(range(40))
    few_shot = [(shared + [100 + i, 7], 2) for i in range(300)]
    hidden = [(shared + [900, 8], 20_000)]
    long = [([500 + i, 3], 15_000) for i in range(20)]
    plan, *_ = planned(few_shot + hidden + long)
    assert plan.split == 1 and 300 in plan.order[-21:]
    assert plan.shared_tokens >= 0.99 * plan.tree.shared_tokens


def test_the_plan_of_some_requests_keeps_their_order():
    plan, *_ = planned([([i % 3, i % 2, i, 1], i * 7 % 40) for i in range(30)])
    chosen = np.arange(30) % 4 == 1
    part = plan.only(chosen)
    assert list(part.order) == [r for r in plan.order if chosen[r]]
    units = {r: u for u, r in zip(plan.by_place(plan.density), plan.order)}
    assert list(part.by_place(part.density)) == [units[r] for r in part.order]


@settings(max_examples=100, deadline=None)
@given(batches, st.integers(1, 5))
def test_parts_are_the_whole_batch_once(batch, ranks):
    plan, _, outputs = planned(batch)
    parts = partition(plan, COST, outputs, ranks)
    assert len(parts) == ranks
    assert sorted(r for part in parts for r in part.order) == list(range(len(batch)))


def test_parts_take_equal_time():
    draw = np.random.default_rng(0)
    batch = [([5, 5, 5, 5, int(draw.integers(9)), i], int(draw.integers(1, 5))) for i in range(3000)]
    batch += [([9, 9, i], int(draw.integers(300, 900))) for i in range(200)]
    plan, _, outputs = planned(batch)
    each = plan.tree.requests(COST, outputs)
    parts = partition(plan, COST, outputs, 4)
    for part in parts:
        assert each.compute[part.order].sum() == pytest.approx(each.compute.sum() / 4, rel=0.01)
        assert each.memory[part.order].sum() == pytest.approx(each.memory.sum() / 4, rel=0.01)
    longest = [outputs[part.order].max() for part in parts]
    assert sorted(longest) == sorted(outputs)[-4:]  # no rank has two of the longest
    with pytest.raises(ValueError, match="at least 1"):
        partition(plan, COST, outputs, 0)


def test_expected_lengths_come_from_the_subtree_then_from_around_it():
    prompts = (
        [[1, 1, 2, 2, i] for i in range(4)]
        + [[1, 1, 3, 3, i] for i in range(4)]
        + [[7, 7, i] for i in range(3)]
    )
    tree = RequestTree.of(workload(prompts), 2)
    least, most = np.zeros(11, np.int64), np.full(11, 100)
    least[10] = most[10] = 60
    found = expect(tree, least, most, np.array([0, 1, 8]), np.array([10, 20, 90]), fewest=1)
    assert list(found.length) == [15] * 8 + [90, 90, 60]  # the second subtree hears its sibling
    assert list(found.square[:9]) == [250] * 8 + [8100] and found.square[10] == 3600
    assert found.group[10] == -1 and found.group[0] == found.group[1] != found.group[8]
    careful = expect(tree, least, most, np.array([0, 1, 8]), np.array([10, 20, 90]), fewest=3)
    assert list(careful.length) == [40] * 10 + [60]
    nothing = expect(tree, least, most)
    assert list(nothing.length[:10]) == [50] * 10 and nothing.length[10] == 60


def test_expected_lengths_stay_within_the_limits_of_each_request():
    tree = RequestTree.of(workload([[i, 1] for i in range(4)]), 2)
    least, most = np.array([0, 30, 0, 0]), np.array([100, 100, 5, 0])
    found = expect(tree, least, most, np.array([0]), np.array([20.0]))
    assert list(found.length) == [20, 30, 5, 0]


def test_a_sample_takes_its_share_of_open_lengths():
    open_ = np.arange(100_000) % 2 == 0
    chosen = sample(open_, 0.01)
    assert open_[chosen].all() and 400 < len(chosen) < 600
    assert Expected.exact(np.array([3, 4])).square.tolist() == [9, 16]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_hardly_any_request_or_identical_ones(count):
    plan, *_ = planned([([1, 2, 3, 4, 5], 0)] * count)
    assert sorted(plan.order) == list(range(count)) and plan.split == 0
