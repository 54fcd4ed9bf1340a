"""Steps in two nano-batches: the same answers, and the way that was measured to be the fastest."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import LLAMA, answers, make_engine, prompts, request, variant
from test_sparsity import SPARSE

from jaxinfer.config import load_config
from jaxinfer.engine import overlap
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.overlap import Overlap, measure
from jaxinfer.models import MoEConfig, init
from jaxinfer.quant.form import quantization
from jaxinfer.schedule.step_times import StepShape, StepTimes, Timing, Way

FIRST = 4
SMALL = ("engine.max_seqs=4", "engine.max_tokens_per_step=16", "engine.layers=scan")  # few programs
BIASED = variant(mlp_bias=True, qkv_bias=True)
WIDE = variant(hidden_size=128, mlp_width=128, head_dim=32)


def always(way: Way, engine: Engine) -> StepTimes:
    """As if that way took half as long as the plain one, in every step of the largest size."""
    size = engine.memory.token_buckets[-1]
    return StepTimes(
        tuple(Timing(each, size, FIRST, (0.0, 1.0), (s, s)) for each, s in ((Way.WHOLE, 2.0), (way, 1.0)))
    )


def asked_for(engine: Engine, monkeypatch) -> list[StepShape]:
    """Those of the steps that are split."""
    found, run = [], engine.device._mixed

    def spy(batch, shape, top):
        found.append(shape)
        return run(batch, shape, top)

    monkeypatch.setattr(engine.device, "_mixed", spy)
    return found


def requests(count=8):
    """Some of which still decode when others bring their prompts."""
    return [request(str(i), p, max_tokens=4 + 9 * (i % 3)) for i, p in enumerate(prompts(count, seed=4))]


@pytest.mark.parametrize(
    "config, settings, way",
    [
        (BIASED, ("engine.layers=unrolled",), Way.CHAINS),
        (
            variant(layers=3),
            ("cache.dtype=int8", *SPARSE, "sparsity.reuse_steps=3", "sparsity.prompt_tail=2"),
            Way.PRODUCT,
        ),
    ],
    ids=["unrolled", "quest"],
)
def test_answers_of_split_steps_are_those_of_whole_ones(config, settings, way, monkeypatch):
    plain = answers(make_engine(config, (*SMALL, *settings)), requests())
    engine = make_engine(config, (*SMALL, *settings))
    engine.device.overlap = Overlap(engine.memory.token_buckets, always(way, engine))
    engine.warm_up()
    compiled, shapes = engine.metrics.compilations, asked_for(engine, monkeypatch)
    split = answers(engine, requests())
    assert engine.metrics.compilations == compiled
    assert {k: v.token_ids for k, v in split.items()} == {k: v.token_ids for k, v in plain.items()}
    assert StepShape(way, engine.memory.token_buckets[-1], FIRST) in shapes


def test_answers_of_split_steps_of_a_quantized_model(monkeypatch):
    config = dataclasses.replace(WIDE, quantization=quantization("atom-w4a8", WIDE))
    model = init(config, jax.random.key(1), "float32")
    settings = load_config(None, [*SMALL, "cache.dtype=int4"])
    found = []
    for split in (False, True):
        engine = Engine(config, model, settings)
        if split:
            engine.device.overlap = Overlap(engine.memory.token_buckets, always(Way.PRODUCT, engine))
        shapes = asked_for(engine, monkeypatch)
        found.append({k: v.token_ids for k, v in answers(engine, requests(6)).items()})
        assert any(shape.way is Way.PRODUCT for shape in shapes) == split
    assert found[0] == found[1]


def test_scores_are_computed_in_whole_steps():
    work = [dataclasses.replace(request(str(i), p), score=True) for i, p in enumerate(prompts(3))]
    plain = answers(make_engine(overrides=SMALL), work)
    engine = make_engine(overrides=SMALL)
    engine.device.overlap = Overlap(engine.memory.token_buckets, always(Way.PRODUCT, engine))
    for name, out in answers(engine, work).items():
        np.testing.assert_allclose(out.prompt_logprobs, plain[name].prompt_logprobs, atol=1e-5)


def test_steps_are_measured_each_way_and_leave_nothing_behind():
    engine = make_engine(overrides=SMALL)
    device, memory = engine.device, engine.memory
    sizes = [(size, FIRST) for size in memory.token_buckets if size >= 16]
    times = measure(device._run_mixed, device._batcher, memory, sizes, tuple(Way), device.reset)
    assert [each[:3] for each in times.timings] == [(way, *sizes[0]) for way in Way]
    assert all(each.keys == tuple(sorted(each.keys)) and min(each.seconds) > 0 for each in times.timings)
    device.reset()
    device.overlap = Overlap(memory.token_buckets, times)
    plain = answers(make_engine(overrides=SMALL), requests())
    assert {k: v.token_ids for k, v in answers(engine, requests()).items()} == {
        k: v.token_ids for k, v in plain.items()
    }


class Stub:
    """Steps that take no time but those of some ways."""

    def __init__(self, monkeypatch, fast=(), broken=()):
        self.asked, self.lost, self.fast, self.broken = [], 0, fast, broken
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        self.engine = make_engine(overrides=SMALL)

    def run(self, batch, shape):
        self.asked.append(shape)
        if shape.way in self.broken:
            raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel\nat address")
        self.now += 1.0 if shape.way in self.fast else 2.0
        return np.zeros(1)

    def measure(self, *offered) -> StepTimes:
        def lost():
            self.lost += 1

        engine = self.engine
        return measure(self.run, engine.device._batcher, engine.memory, [(12, 4), (16, 4)], offered, lost)


def test_a_way_that_gains_nothing_in_the_largest_steps_is_not_tried_in_smaller_ones(monkeypatch):
    stub = Stub(monkeypatch, fast=(Way.CHAINS,))
    times = stub.measure(*Way)
    assert [each[:2] for each in times.timings if each.tokens == 12] == [(Way.WHOLE, 12), (Way.CHAINS, 12)]
    assert times.shapes == {StepShape(Way.CHAINS, 12, 4), StepShape(Way.CHAINS, 16, 4)}


def test_a_way_that_the_device_cannot_run_is_left_out_and_said(monkeypatch, caplog):
    stub = Stub(monkeypatch, fast=(Way.CHAINS,), broken=(Way.PRODUCT,))
    times = stub.measure(Way.WHOLE, Way.PRODUCT, Way.CHAINS)
    assert {each.way for each in times.timings} == {Way.WHOLE, Way.CHAINS} and stub.lost == 1
    assert [record.getMessage() for record in caplog.records] == [
        "engine.overlap: no product steps of 16 tokens: INTERNAL: no such kernel"
    ]


def test_a_cpu_runs_whole_steps_and_measures_nothing(monkeypatch):
    monkeypatch.setattr("jaxinfer.engine.device.measure", None)
    engine = make_engine(overrides=("engine.overlap=auto",))
    assert engine.device.overlap.times is None and engine.device.overlap.always is Way.WHOLE


def test_what_a_gpu_is_offered_depends_on_the_model(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    moe = variant(family="mixtral", moe=MoEConfig(experts=4, experts_per_token=2, width=24))
    assert overlap.ways(LLAMA) == tuple(Way)
    assert overlap.ways(moe) == (Way.WHOLE, Way.ATTENTION)
    assert overlap.ways(variant(windows=(24, 0))) == (Way.WHOLE,)


def test_nano_batches_are_whole_tiles():
    engine = make_engine(overrides=("engine.max_seqs=200", "engine.max_tokens_per_step=1024"))
    assert overlap.pairs(engine.memory) == [
        (256, 128), (512, 128), (512, 256), (1024, 128), (1024, 256),
    ]  # fmt: skip
