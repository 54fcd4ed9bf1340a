"""The tree of a batch against brute force: nodes, sharing, densities, order."""

import numpy as np
import pytest
from batches import COST, chains, families, unique_tokens, workload
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.schedule.tree import RequestTree

prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=25)
sizes = st.sampled_from([1, 2, 3])


def path_of(tree, node, prompts):
    return tuple(prompts[tree.order[tree.first[node]]][: tree.depth[node]])


@settings(max_examples=300, deadline=None)
@given(prompts_of_few_tokens, sizes)
def test_nodes_are_where_prompts_part(prompts, page_size):
    tree = RequestTree.of(workload(prompts), page_size)
    found = {
        path_of(tree, node, prompts) if prompts else (): sorted(
            tree.order[tree.first[node] : tree.last[node]]
        )
        for node in range(len(tree.first))
    }
    assert found == families(prompts, page_size)
    assert len(found) == len(tree.first)
    for node in range(1, len(tree.first)):
        up = tree.parent[node]
        assert up < node and tree.depth[up] < tree.depth[node]
        assert tree.first[up] <= tree.first[node] and tree.last[node] <= tree.last[up]
    paths = chains(prompts, page_size)
    for index, node in enumerate(tree.attach):
        inside = [path for path in found if path == () or path in paths[index]]
        assert path_of(tree, node, prompts) == max(inside, key=len)
    assert tree.shared_tokens == sum(map(len, prompts)) - unique_tokens(
        prompts, range(len(prompts)), page_size
    )


@settings(max_examples=200, deadline=None)
@given(prompts_of_few_tokens, sizes, st.randoms(use_true_random=False))
def test_densities_count_what_is_shared_below_a_node_once(prompts, page_size, random):
    outputs = np.array([random.randrange(5) for _ in prompts], np.int64)
    tree = RequestTree.of(workload(prompts), page_size)
    totals = tree.nodes(COST, outputs)
    for node in range(len(tree.first)):
        members = tree.order[tree.first[node] : tree.last[node]]
        above = tree.depth[tree.parent[node]] if node else 0
        tokens = unique_tokens(prompts, members, page_size, above)
        computed = sum(outputs[i] for i in members) + tokens
        reads = sum(len(prompts[i]) * outputs[i] + outputs[i] ** 2 / 2 for i in members)
        assert totals.compute[node] == pytest.approx(computed * COST.token_seconds)
        assert totals.memory[node] == pytest.approx(reads * COST.key_seconds)
        density = computed * COST.token_seconds / (reads * COST.key_seconds) if reads else np.inf
        assert totals.density[node] == pytest.approx(density)


@settings(max_examples=300, deadline=None)
@given(prompts_of_few_tokens, sizes, st.randoms(use_true_random=False))
def test_arranging_sorts_the_children_of_every_node_and_keeps_the_tree(prompts, page_size, random):
    tree = RequestTree.of(workload(prompts), page_size)
    keys = {
        path_of(tree, node, prompts) if node else (): random.randrange(6) for node in range(len(tree.first))
    }
    of_requests = np.array([random.randrange(6) for _ in prompts], np.int64)
    of_nodes = np.array([keys[path_of(tree, n, prompts) if n else ()] for n in range(len(tree.first))])
    found = tree.arranged(of_nodes, of_requests)
    assert list(found.order) == brute_order(prompts, page_size, keys, of_requests, list(tree.order))
    paths = {n: path_of(found, n, prompts) if n else () for n in range(len(found.first))}
    members = {paths[n]: sorted(found.order[found.first[n] : found.last[n]]) for n in paths}
    assert members == families(prompts, page_size)
    assert [paths[n] for n in found.attach] == [path_of(tree, n, prompts) if n else () for n in tree.attach]


def brute_order(prompts, page_size, keys, of_requests, as_before):
    found, paths = families(prompts, page_size), chains(prompts, page_size)

    def deepest(index):
        return max((node for node in found if node == () or node in paths[index]), key=len)

    def walk(node):
        below = [n for n in found if len(n) > len(node) and n[: len(node)] == node and n != node]
        children = [
            n for n in below if not any(len(m) < len(n) and n[: len(m)] == m for m in below if m != n)
        ]
        items = [(keys[n], min(as_before.index(i) for i in found[n]), n) for n in children]
        items += [(of_requests[i], as_before.index(i), i) for i in found[node] if deepest(i) == node]
        order = []
        for _, _, item in sorted(items, key=lambda item: item[:2]):
            order += walk(item) if isinstance(item, tuple) else [item]
        return order

    return walk(())


def test_by_arrival_the_first_comes_first():
    prompts = [[7, 7, 1, 1, 0], [5, 5, 0], [7, 7, 2, 2, 0], [5, 5, 1, 1, 0], [9, 9, 9], [7, 7, 1, 1, 3]]
    assert list(RequestTree.of(workload(prompts), 2).by_arrival().order) == [0, 5, 2, 1, 3, 4]


def test_a_prefix_that_is_another_prompt_entire_and_identical_prompts():
    prompts = [[1] * 9, [1] * 5, [1] * 9, [1] * 9, [1] * 3]
    tree = RequestTree.of(workload(prompts), 2)
    assert tree.shared_tokens == 2 + 4 + 8 + 8
    assert sorted(tree.depth) == [0, 2, 4, 8]
    assert tree.alone[0] == tree.alone[2] == 1


@pytest.mark.parametrize("prompts", [[], [[1, 2, 3]], [[], []]])
def test_hardly_any_request(prompts):
    tree = RequestTree.of(workload(prompts), 2)
    assert list(tree.order) == list(range(len(prompts))) and tree.shared_tokens == 0
    zero = np.zeros(len(prompts), np.int64)
    assert len(tree.nodes(COST, zero).density) == 1
    assert list(tree.by_arrival().order) == list(range(len(prompts)))
