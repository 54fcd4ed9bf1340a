"""A layer's exchange without JAX's part: what the host computes and what lands in the slots is all that was asked for."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.offload import policy
from jaxinfer.offload.exchange import Exchange
from jaxinfer.offload.host_experts import ExpertError, LayerExperts
from jaxinfer.offload.latency import Costs, Engine
from jaxinfer.offload.residents import Residents
from jaxinfer.offload.timeline import Split
from pallas_kernels.packed_experts.host import HostExperts

from .engines import LAYERS, MOE, store

COSTS = Costs(host=Engine(1e-4, 2e-5), device=Engine(2e-5, 1e-6), link=1.5e-4)
EXPERTS = MOE.moe.experts


class Side:
    """The device's part of a step, done by hand over the pool's own memory."""

    def __init__(self, folder, rule, slots, landing, adaptive=True, placed=None, costs=COSTS, foresight=None):
        self.store, self.rng = store(folder), np.random.default_rng(5)
        self.pool = np.zeros((slots, self.store.record.nbytes), np.uint8)
        shape = (len(LAYERS), EXPERTS)
        resident = np.zeros(shape, bool)
        resident.flat[: slots - landing] = True
        self.residents = Residents(resident if placed is None else placed, landing)
        for slot, (row, expert) in enumerate(self.residents.begin()):
            self.pool[slot] = self.store.of_layer(row)[expert]
        host = LayerExperts(self.store, activation="silu", threads=2)
        parts = (self.store, self.residents, host, rule, costs)
        self.exchange = Exchange(*parts, foresight=foresight, adaptive=adaptive)
        self.kernel = HostExperts(self.store.record, activation="silu", threads=1)

    def layer(self, row, x, ids, shares):
        """One layer as `callback` asks for it. [T, D]"""
        answer = self.exchange.answer(row, x, ids, shares)
        total = self.kernel(x, self.pool, answer.slots, shares)
        for expert in answer.stream:
            total += self.kernel(x, self.store.of_layer(row), np.where(ids == expert, expert, -1), shares)
        assert len(answer.moves) <= len(self.residents.landing) + 1
        for slot, place in answer.moves:
            self.pool[slot] = self.store.records[place]
        return total + self.exchange.collect(x.shape)

    def step(self, tokens, hot=None):
        """A random step through all layers, each checked against the host alone."""
        for row in range(len(LAYERS)):
            x = self.rng.standard_normal((tokens, MOE.hidden_size), np.float32)
            ids = np.argsort(self.rng.random((tokens, EXPERTS)), axis=1)[:, :2].astype(np.int32)
            if hot is not None:
                ids = np.full_like(ids, -1)
                ids[:, 0] = hot[row]
            ids[self.rng.random(tokens) < 0.1] = -1
            shares = self.rng.random(ids.shape, np.float32)
            wanted = self.kernel(x, self.store.of_layer(row), ids, shares)
            np.testing.assert_allclose(self.layer(row, x, ids, shares), wanted, rtol=1e-5, atol=1e-5)
            self.residents.check_integrity()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


def any_split(rng):
    def split(load, costs):
        missing = [int(expert) for expert in rng.permutation(load.missing)]
        cut = int(rng.integers(len(missing) + 1))
        return Split(tuple(missing[:cut]), tuple(missing[cut:]))

    return split


@pytest.mark.parametrize("slots, landing", [(1, 1), (2, 2), (7, 3), (12, 6), (17, 2)])
def test_any_split_over_many_steps(folder, slots, landing):
    side = Side(folder, any_split(np.random.default_rng(slots)), slots, landing)
    for step in range(150):
        side.step([1, 2, 64, 9][step % 4])
    traffic = side.exchange.traffic
    assert traffic.layers == 450 and traffic.collected == 0
    assert traffic.on_host > 0 and traffic.streamed > 0
    side.exchange.close()


@pytest.mark.parametrize("name", policy.POLICIES)
def test_policies(folder, name):
    side = Side(folder, policy.POLICIES[name], 6, 2, adaptive=False)
    for tokens in (1, 64, 5, 200):
        side.step(tokens)
    traffic = side.exchange.traffic
    assert (traffic.streamed > 0) == (name != "host") and (traffic.on_host > 0) == (name != "stream")
    assert traffic.kept == 0
    side.exchange.close()


@pytest.mark.parametrize("name", ["host", "stream"])
def test_the_experts_that_are_asked_for_move_in(folder, name):
    placed = np.zeros((len(LAYERS), EXPERTS), bool)
    placed[:, 0] = True
    side = Side(folder, policy.POLICIES[name], 5, 2, placed=placed)
    for _ in range(30):
        side.step(1, hot=[3, 4, 5])
    assert all(side.residents.stays(row, expert) for row, expert in enumerate([3, 4, 5]))
    traffic = side.exchange.traffic
    assert traffic.kept >= 3 and traffic.hits > traffic.visits / 3
    side.exchange.close()


class Knows:
    """Foresees what the next layer is going to be asked for."""

    hot = (0, 0, 0)

    def tokens(self, row, x):
        return np.bincount([self.hot[row + 1]], minlength=EXPERTS)


def test_what_the_next_layer_will_ask_for_is_brought_while_the_host_computes(folder):
    costs = replace(COSTS, link=COSTS.host.flat / 2, ask=0.0)
    knows = Knows()
    side = Side(folder, policy.host, 5, 2, adaptive=False, costs=costs, foresight=knows)
    for _ in range(20):
        knows.hot = side.rng.integers(EXPERTS, size=3)
        side.step(64, hot=knows.hot)
    traffic = side.exchange.traffic
    assert traffic.streamed == traffic.ahead == traffic.ahead_used > 10
    assert traffic.hits == traffic.visits - traffic.on_host > 0


def test_nothing_is_brought_ahead_where_the_link_has_no_time(folder):
    costs = replace(COSTS, link=COSTS.host.flat * 100, ask=0.0)
    side = Side(folder, policy.host, 5, 2, adaptive=False, costs=costs, foresight=Knows())
    for _ in range(5):
        side.step(3, hot=[3, 4, 5])
    assert side.exchange.traffic.ahead == 0


def test_a_failure_names_layer_and_expert_and_the_next_step_is_right(folder, monkeypatch):
    side = Side(folder, lambda load, costs: Split(host=(2,)), 4, 4)

    def wrong(*args):
        raise OSError("the disk is gone")

    x, ids, shares = np.ones((1, 32), np.float32), np.array([[2, -1]], np.int32), np.ones((1, 2), np.float32)
    monkeypatch.setattr(LayerExperts, "compute", wrong)
    side.exchange.answer(2, x, ids, shares)
    with pytest.raises(ExpertError, match="layer 3, expert 2: OSError: the disk is gone") as caught:
        side.exchange.collect(x.shape)
    assert (caught.value.layer, caught.value.expert) == (3, 2)
    monkeypatch.undo()
    side.exchange._policy = any_split(np.random.default_rng(0))
    side.step(9)
    side.exchange.close()
