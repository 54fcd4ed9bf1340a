"""Units and who is sent them: everything once, equal work, subtrees whole, and nothing lost with a worker."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "schedule"))

from batches import workload

from jaxinfer.scaleout.dispatch import Dispatcher
from jaxinfer.scaleout.units import Units
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.plan import make_plan
from jaxinfer.schedule.profile import PRACTICAL, SUM
from jaxinfer.schedule.tree import RequestTree
from jaxinfer.schedule.workload import Sharing

PAGE = 16


def cut(prompts, outputs, workers, joint=SUM):
    cost = Cost(token_seconds=3.0, key_seconds=0.02, joint=joint)
    batch = workload(prompts)
    sharing = Sharing.of(batch, PAGE)
    tree = RequestTree.shared(batch, sharing, PAGE)
    outputs = np.asarray(outputs, float)
    plan = make_plan(tree, cost, outputs)
    return tree, Units.cut(plan, cost, outputs, 4 * workers, sharing, turns=4)


def few_shot(seed=0):
    """Questions behind shared examples, chats, and long answers."""
    draw = np.random.default_rng(seed)
    prompts, outputs = [], []
    for family in range(20):
        examples = draw.integers(0, 99, 320).tolist()
        for _ in range(100):
            prompts.append([*examples, *draw.integers(0, 99, 40).tolist()])
            outputs.append(int(draw.integers(1, 8)))
        for _ in range(20):
            prompts.append([family, *draw.integers(0, 99, int(draw.integers(20, 400))).tolist()])
            outputs.append(int(draw.integers(10, 400)))
    return prompts, outputs


def computed(tree, rows):
    """Prompt tokens that go through one engine whose cache keeps everything."""
    nodes = set()
    for node in set(tree.attach[rows].tolist()):
        while node > 0 and node not in nodes:
            nodes.add(node)
            node = int(tree.parent[node])
    return int(tree.alone[rows].sum() + tree.own[sorted(nodes)].sum())


def taken(dispatcher, worker, most):
    """By a worker that has nothing else."""
    sides = dispatcher.sides
    rows = dispatcher.take(worker, [most] * sides, [0] * sides, idle=True)
    return np.concatenate(rows).tolist()


def serve(dispatcher, workers, speeds, most=7):
    """The rows of each worker, when they take turns by their speeds."""
    rows, credit = [[] for _ in range(workers)], np.zeros(workers)
    while dispatcher.left:
        credit += speeds
        for worker in range(workers):
            if credit[worker] >= 1:
                credit[worker] -= 1
                rows[worker] += taken(dispatcher, worker, most)
    return rows


@pytest.mark.parametrize("joint", [SUM, PRACTICAL])
def test_four_workers_share_nearly_what_one_shares(joint):
    tree, units = cut(*few_shot(), 4, joint)
    every = 4 * units.sides  # lines of a worker
    parts = [units.line[first:last] for first, last in pairwise(units.starts[::every])]
    total = int(tree.prompt.sum())
    shared = total - sum(computed(tree, part) for part in parts)
    assert shared >= 0.97 * tree.shared_tokens > 0.3 * total
    seconds = np.diff(units.seconds[units.starts[::every]])
    assert seconds.max() <= 1.05 * seconds.mean()


def test_idle_workers_take_whole_subtrees():
    tree, units = cut(*few_shot(), 4)
    dispatcher = Dispatcher(units, 4)
    rows = serve(dispatcher, 4, np.array([1.0, 1.0, 1.0, 0.25]))
    assert sorted(row for part in rows for row in part) == list(range(len(tree.order)))
    assert dispatcher.stolen > 0 and len(rows[3]) < len(rows[0]) / 2
    shared = int(tree.prompt.sum()) - sum(computed(tree, np.array(part)) for part in rows)
    assert shared >= 0.95 * tree.shared_tokens


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.integers(1, 40)), max_size=40
    ),
    st.integers(1, 4),
    st.sampled_from([SUM, PRACTICAL]),
    st.data(),
)
def test_every_row_is_sent_once_and_again_if_it_was_lost(batch, workers, joint, data):
    _, units = cut([prompt for prompt, _ in batch], [output for _, output in batch], workers, joint)
    assert sorted(units.line) == list(range(len(batch)))
    dispatcher, side = Dispatcher(units, workers), units.side_of(len(batch))
    answered, lost = [], 0
    for _ in range(1000):
        worker = data.draw(st.integers(0, workers - 1))
        rows = taken(dispatcher, worker, data.draw(st.integers(1, 6)))
        if rows and lost < 8 and data.draw(st.booleans()):
            lost += 1
            guilty = dispatcher.give_back([[r for r in rows if side[r] == s] for s in range(units.sides)])
            assert guilty is None or rows == [guilty]
            answered += [] if guilty is None else [guilty]
        else:
            answered += rows
        if not dispatcher.left:
            break
    assert sorted(answered) == list(range(len(batch)))


def test_a_unit_is_sent_from_both_ends_and_has_the_mix_of_the_batch():
    prompts, outputs = few_shot()
    tree, units = cut(prompts, outputs, 4, PRACTICAL)
    cost = Cost(token_seconds=3.0, key_seconds=0.02, joint=PRACTICAL)
    each = tree.requests(cost, np.asarray(outputs, float))
    root, found = each.compute.sum() / each.memory.sum(), []
    for first, middle, last in zip(units.starts[:-1:2], units.starts[1::2], units.starts[2::2]):
        light, heavy = units.line[first:middle], units.line[middle:last]
        assert each.density[light].min() > each.density[heavy].max()
        quarter = len(heavy) // 4
        assert each.memory[heavy[:quarter]].mean() > each.memory[heavy[-quarter:]].mean()  # the longest begin
        unit = np.concatenate([light, heavy])
        found.append(each.compute[unit].sum() / each.memory[unit].sum() / root)
    assert min(found) > 0.8 and max(found) < 1.25


def test_what_is_kept_for_a_worker_is_the_work_that_it_has_not_been_sent():
    prompts, outputs = few_shot()
    tree, units = cut(prompts, outputs, 3, PRACTICAL)
    dispatcher, side = Dispatcher(units, 3), units.side_of(len(prompts))
    sent = dispatcher.take(1, [50, 5], [0, 0], idle=True)
    assert [len(rows) for rows in sent] == [50, 5]
    assert all((side[rows] == number).all() for number, rows in enumerate(sent))
    mine = units.line[units.starts[8] : units.starts[16]]
    kept = np.setdiff1d(mine, np.concatenate(sent))
    prompt, answer = tree.prompt.astype(float), np.asarray(outputs, float)
    for number, coming in enumerate(dispatcher.coming(1)):
        rows = kept[side[kept] == number]
        reads = prompt[rows] * answer[rows] + answer[rows] ** 2 / 2
        expected = [(tree.alone[rows] + answer[rows]).sum(), answer[rows].sum(), reads.sum()]
        np.testing.assert_allclose(coming, expected)


def test_a_worker_takes_from_others_only_what_it_has_none_of():
    _, units = cut(*few_shot(), 2, PRACTICAL)
    dispatcher, side = Dispatcher(units, 2), units.side_of(len(units.line))
    of_both = [np.diff(units.starts)[number:8:2].sum() for number in (0, 1)]
    lights, heavies = dispatcher.take(0, of_both, [0, 0], idle=True)
    assert [len(lights), len(heavies)] == of_both
    lights, heavies = dispatcher.take(0, [9, 9], [0, 1], idle=False)
    assert len(lights) == 9 and not len(heavies) and (side[lights] == 0).all()
    assert dispatcher.stolen > 0
    left = dispatcher.left
    assert not any(map(len, dispatcher.take(1, [-1, 0], [3, 0], idle=False))) and dispatcher.left == left


@pytest.mark.parametrize("joint", [SUM, PRACTICAL])
def test_the_longest_requests_are_in_the_first_unit_of_each_worker(joint):
    prompts, outputs = few_shot()
    tree, units = cut(prompts, outputs, 4, joint)
    cost = Cost(token_seconds=3.0, key_seconds=0.02, joint=joint)
    memory = tree.requests(cost, np.asarray(outputs, float)).memory
    turn = np.empty(len(memory), int)
    turn[units.line] = np.repeat(np.arange(len(units)) % 4, np.diff(units.starts[:: units.sides]))
    longest = np.argsort(-memory)
    assert (turn[longest[:30]] == 0).all()
    assert (turn[longest[:60]] <= 1).all()
