"""What the engine counts is what was asked of it, however its steps were cut."""

import copy

import pytest
from helpers import LLAMA, MIXTRAL, answers, make_engine, request

from jaxinfer.schedule.demand import DemandModel, Span


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=lambda config: config.family)
@pytest.mark.parametrize("cut", [(), ("engine.decode_steps=1",), ("engine.chunk=5", "engine.decode_steps=3")])
def test_operations_are_those_of_every_token_at_its_place(config, cut):
    lengths = [(3, 1), (40, 9), (17, 30)]
    engine = make_engine(config, cut)
    out = answers(
        engine,
        [request(f"r{p}", [(p * 7 + i) % 90 + 3 for i in range(p)], max_tokens=d) for p, d in lengths],
    )
    assert [len(out[f"r{p}"].choices[0].token_ids) for p, d in lengths] == [d for _, d in lengths]
    model = DemandModel(config, "float32")
    assert engine.metrics.flops == sum(model.step([Span(0, p + d - 1, d)]).flops for p, d in lengths)
    assert engine.metrics.prefill_tokens == sum(p for p, _ in lengths)
    assert engine.metrics.computed_tokens == sum(p + d - 1 for p, d in lengths)


def test_bytes_of_one_row_are_those_of_its_steps():
    engine = make_engine(LLAMA, ("engine.chunk=16", "engine.decode_steps=4"))
    answers(engine, [request("r", range(3, 43), max_tokens=11)])
    model = DemandModel(LLAMA, "float32")
    calls = [model.step([Span(0, 16, 0)]), model.step([Span(16, 16, 0)]), model.step([Span(32, 8, 1)])]
    calls.append(model.decode([Span(40, 10, 10)]))
    assert engine.metrics.kv_bytes == sum(call.kv_bytes for call in calls)
    assert engine.metrics.bytes == sum(call.bytes for call in calls)


def test_a_scored_prompt_asks_for_the_logits_of_every_token():
    engine = make_engine()
    scored = request("s", range(3, 23))
    answers(
        engine, [type(scored)(id="s", prompt_ids=scored.prompt_ids, sampling=scored.sampling, score=True)]
    )
    assert engine.metrics.flops == DemandModel(LLAMA, "float32").step([Span(0, 20, 20)]).flops


def test_a_prefix_found_is_not_asked_for_again():
    engine = make_engine()
    prompt = list(range(3, 53))
    answers(engine, [request("first", prompt, max_tokens=1)])
    before = copy.copy(engine.metrics)
    answers(engine, [request("second", prompt, max_tokens=1)])
    model = DemandModel(LLAMA, "float32")
    assert engine.metrics.since(before).flops == model.step([Span(48, 2)]).flops


def test_gauges_account_for_the_pool_at_every_step():
    engine = make_engine(LLAMA, ("cache.pages=24",))
    for i in range(20):
        engine.add(request(f"r{i}", [i % 5 + 3] * 33 + [i + 3] * 9, max_tokens=20))
    seen = set()
    while engine.busy and len(engine._finished) < 20:
        running_before = len(engine.planner.running)
        engine.step()
        now = engine.metrics
        assert now.pages == 23 and 0 <= now.pages_in_use + now.pages_kept <= now.pages
        assert now.running <= 8 and (now.running or running_before == 0)
        seen.add((now.pages_in_use > 0, now.pages_kept > 0))
    assert (True, False) in seen and (True, True) in seen
    before = copy.copy(engine.metrics)
    assert engine.metrics.since(before).pages == 23 and engine.metrics.since(before).calls == 0
