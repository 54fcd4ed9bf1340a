"""Simulated batches: every request ends, the pool holds, time is what the steps say, whatever the lengths and estimates."""

import dataclasses

import numpy as np
import pytest
from batches import COST, workload
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.schedule.lengths import Expected
from jaxinfer.schedule.plan import make_plan
from jaxinfer.schedule.pool import SimulatedPool
from jaxinfer.schedule.profile import MAX, PRACTICAL, SUM, Joint
from jaxinfer.schedule.scanner import LEFT, RIGHT
from jaxinfer.schedule.scanners import blend_scanner, fixed_scanner, paper_scanner
from jaxinfer.schedule.simulate import practical_optimum, simulate
from jaxinfer.schedule.steps import SimulatedSteps
from jaxinfer.schedule.tree import RequestTree

KINDS = ("fixed", "paper", "blend")
CAPACITY = 160


def scanner_of(kind, tree, expected, capacity=CAPACITY, max_tokens=24, quantum=4, **more):
    plan = make_plan(tree, COST, expected.length)
    shape = {"capacity": capacity, "max_tokens": max_tokens} | more
    if kind == "fixed":
        return fixed_scanner(tree.by_arrival().order, tree.prompt, expected, **shape)
    if kind == "paper":
        return paper_scanner(plan, expected, quantum=quantum, **shape)
    return blend_scanner(plan, expected, COST, quantum=quantum, **shape)


class Watched(SimulatedSteps):
    """Checks its own books after every step."""

    def step(self):
        super().step()
        assert self.clock < 100_000, "it does not end"
        running = np.flatnonzero(self.turn >= 0)
        decoding = [r for r in running if self.ends[r] >= 0]
        now = {r: self.done[r] + (self.clock - self.since[r] if self.ends[r] >= 0 else 0) for r in running}
        held = sum(self.pool.alone[r] + now[r] for r in running)
        assert self.pool.used == held + self.pool.own[self.pool.cached].sum() <= self.pool.capacity
        assert self.keys == sum(self.prompt[r] + now[r] for r in decoding) and self.decoding == len(decoding)
        used = self.pool.cached & (self.pool.users == 0)
        assert self.pool.idle == self.pool.own[used].sum()


def run(kind, prompts, outputs, expected, capacity=CAPACITY):
    tree = RequestTree.of(workload(prompts), 2)
    pool = SimulatedPool(tree.own, tree.parent, tree.attach, tree.alone, capacity)
    scanner = scanner_of(kind, tree, expected, capacity)
    steps = Watched(scanner, pool, tree.prompt, np.asarray(outputs), 3.0, 0.5, 20.0, 0.3, 0.0, 16)
    steps.run()
    return tree, steps


jobs = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(1, 60)), max_size=25
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(batch=jobs, lie=st.sampled_from(["true", "zero", "huge", "random"]), data=st.data())
def test_every_request_ends_and_the_books_are_right_under_any_estimate(kind, batch, lie, data):
    prompts, outputs = [p for p, _ in batch], np.array([o for _, o in batch], np.int64)
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    claims = {"true": outputs, "zero": outputs * 0, "huge": outputs * 0 + 10**6}
    expected = Expected.exact(claims.get(lie, draw.integers(0, 200, len(outputs))))
    if lie == "random":
        group = draw.integers(-1, 2, len(outputs))
        expected = expected._replace(group=group, weight=np.ones(2))
    tree, steps = run(kind, prompts, outputs, expected)
    assert steps.finished == len(batch)
    once = tree.prompt.sum() + (outputs - 1).sum() - steps.cached
    assert steps.computed >= once
    if not steps.preemptions:
        assert steps.computed == once
        reads = (tree.prompt * (outputs - 1) + outputs * (outputs - 1) // 2).sum()
        assert steps.memory == pytest.approx(0.5 * reads)
        assert steps.cached <= tree.shared_tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "outputs",
    [[1] * 12, [100] * 12, [130, *[1] * 11], [1] * 11 + [130]],
    ids=["all short", "all maximal", "a giant first", "a giant last"],
)
def test_adversarial_lengths(kind, outputs):
    outputs = np.array(outputs)
    for prompts in ([[1, 2, 3, 4, 5]] * 12, [[1] * (i + 1) for i in range(12)], [[i] for i in range(12)]):
        for claim in (outputs, outputs * 0, 131 - outputs):
            assert run(kind, prompts, outputs, Expected.exact(claim))[1].finished == 12


def test_a_step_takes_the_time_of_its_work_by_hand():
    """Prompt of 5 in two steps of 4 and 1 tokens, then two decode steps that read 6 and 7 keys."""
    tree = RequestTree.of(workload([[1, 2, 3, 4, 5]]), 2)
    scanner = fixed_scanner(
        np.array([0]), tree.prompt, Expected.exact(np.array([3])), capacity=50, max_tokens=4
    )
    out = simulate(scanner, tree, np.array([3]), COST, capacity=50, fast=False)
    assert out.steps == 4 and out.computed == 7
    assert out.seconds == pytest.approx(20 + 20 + (20 + 0.3 * 3) + (20 + 0.3 * 3.5))
    assert out.series[:, 0].sum() == pytest.approx(out.seconds)


def test_blending_beats_one_kind_after_the_other_and_loses_no_prefix():
    draw = np.random.default_rng(3)
    prompts = [[1, 1, *draw.integers(0, 9, 30)] for _ in range(200)] + [[2, i] for i in range(30)]
    outputs = np.array([2] * 200 + [120] * 30)
    tree = RequestTree.of(workload(prompts), 2)
    for joint, least in ((PRACTICAL, 1.1), (MAX, 1.15), (SUM, 1.0)):
        cost = COST.__class__(token_seconds=3.0, key_seconds=0.05, step_seconds=3.0, joint=joint)
        plan, true = make_plan(tree, cost, outputs), Expected.exact(outputs)
        shape = {"capacity": 1000, "max_tokens": 32}
        dfs = fixed_scanner(tree.by_arrival().order, tree.prompt, true, **shape)
        blend = blend_scanner(plan, true, cost, quantum=4, **shape)
        dfs, blend = (simulate(s, tree, outputs, cost, capacity=1000, fast=False) for s in (dfs, blend))
        assert dfs.seconds / blend.seconds > least
        assert blend.cached >= 0.97 * dfs.cached
        assert blend.seconds >= practical_optimum(tree, outputs, cost) * 0.999


def test_shares_of_the_pool_are_the_papers():
    """Its figure 6: densities 3.73, 0.096 and 1.27 at 60 GB give 19.3 and 40.7 GB."""
    scanner = paper_scanner.__globals__["PaperScanner"](
        np.arange(2),
        np.arange(3),
        np.array([3.73, 0.096]),
        1.27,
        np.ones(2),
        np.ones(2),
        np.ones(2),
        60e9,
        8,
        1,
    )
    assert scanner.share == pytest.approx([19.4e9, 40.6e9], rel=0.005)
    assert scanner.peek(LEFT) == 0 and scanner.peek(RIGHT) == 1


def test_what_cannot_fit_is_refused():
    tree = RequestTree.of(workload([[1] * 40]), 2)
    scanner = scanner_of("blend", tree, Expected.exact(np.array([9])), capacity=30)
    with pytest.raises(ValueError, match="49 tokens, a pool of 30"):
        simulate(scanner, tree, np.array([9]), COST, capacity=30, fast=False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind):
    tree = RequestTree.of(workload([]), 2)
    expected = Expected.exact(np.zeros(0))
    out = simulate(scanner_of(kind, tree, expected), tree, np.zeros(0), COST, capacity=9, fast=False)
    assert out.seconds == 0 and out.steps == 0


@pytest.mark.parametrize("kind", KINDS)
def test_another_joint_time_is_told_from_the_same_steps(kind):
    draw = np.random.default_rng(8)
    prompts = [list(draw.integers(0, 2, draw.integers(1, 40))) for _ in range(60)]
    outputs = draw.integers(1, 60, 60)
    tree, expected = RequestTree.of(workload(prompts), 2), Expected.exact(outputs)

    def seconds(joint):
        cost = dataclasses.replace(COST, joint=joint)
        scanner = scanner_of(kind, tree, expected)
        return simulate(scanner, tree, outputs, cost, capacity=CAPACITY, fast=False)

    plain = seconds(PRACTICAL)
    for joint in (SUM, MAX, Joint(0.2, 0.5)):
        assert plain.under(joint, PRACTICAL).seconds == pytest.approx(seconds(joint).seconds)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_plain_agree(kind):
    from jaxinfer.schedule.simulate import compiled

    draw = np.random.default_rng(5)
    prompts = [list(draw.integers(0, 2, draw.integers(1, 40))) for _ in range(120)]
    outputs = draw.integers(1, 60, 120)
    tree, expected = RequestTree.of(workload(prompts), 2), Expected.exact(outputs)
    plain = simulate(scanner_of(kind, tree, expected), tree, outputs, COST, capacity=CAPACITY, fast=False)
    fast = simulate(scanner_of(kind, tree, expected, make=compiled), tree, outputs, COST, capacity=CAPACITY)
    assert plain[:-1] == pytest.approx(fast[:-1])
    assert plain.series == pytest.approx(fast.series)


def test_joint_times_must_be_between_max_and_sum():
    with pytest.raises(Exception, match="between max and sum"):
        Joint(0.5, 0.7)
