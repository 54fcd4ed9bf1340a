"""Faults of the device and of single requests."""

import jax
import numpy as np
import pytest
from helpers import LLAMA, answers, greedy, make_engine, request, weights

from jaxinfer.engine.answers import OpenRequest
from jaxinfer.engine.engine import Engine
from jaxinfer.errors import EngineError
from jaxinfer.models import unstack

WORK = [np.random.default_rng(9).integers(3, 97, 12 + 5 * i) for i in range(8)]


def requests():
    return [request(str(i), prompt, max_tokens=10) for i, prompt in enumerate(WORK)]


def fail_above(engine: Engine, monkeypatch, tokens: int) -> list[int]:
    """Mixed steps of more than `tokens` padded tokens run out of memory, their donated state lost with them."""
    sizes, real = [], engine.device._programs.mixed

    def mixed_step(weights, state, batch, **static):
        sizes.append(batch.tokens.shape[1])
        if sizes[-1] > tokens:
            jax.tree.map(lambda leaf: leaf.delete(), state)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        return real(weights, state, batch, **static)

    monkeypatch.setattr(engine.device._programs, "mixed", mixed_step)
    return sizes


def test_out_of_memory_makes_steps_smaller_and_loses_nothing(monkeypatch, caplog):
    engine = make_engine()
    sizes = fail_above(engine, monkeypatch, 16)
    out = answers(engine, requests())
    assert all(list(out[str(i)].token_ids) == greedy(LLAMA, p, 10) for i, p in enumerate(WORK))
    assert max(sizes) > 16 and engine.metrics.shrinks > 0 and "out of device memory" in caplog.text


def test_no_memory_for_anything_ends_the_run(monkeypatch):
    engine = make_engine()
    fail_above(engine, monkeypatch, 0)
    with pytest.raises(EngineError, match="no memory for a step of one token"):
        answers(engine, requests())
    engine.check_integrity()
    monkeypatch.undo()
    out = answers(engine, requests())  # no page of the steps that failed is taken for computed
    assert all(list(out[str(i)].token_ids) == greedy(LLAMA, p, 10) for i, p in enumerate(WORK))
    assert engine.planner.max_running == 8


def test_another_fault_of_the_device_ends_the_run(monkeypatch):
    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    engine = make_engine()
    monkeypatch.setattr(engine.device._programs, "mixed", broken)
    with pytest.raises(EngineError, match="the device is gone"):
        answers(engine, requests())


def test_scores_that_are_no_numbers_fail_their_request_alone():
    model = unstack(weights(LLAMA), LLAMA)
    model.embed = model.embed.at[96].set(np.nan)  # tied to no head: only prompts with token 96 are poisoned
    engine = Engine(LLAMA, model, make_engine().settings)
    out = answers(engine, [*requests()[:2], request("bad", [5, 96, 7]), *requests()[2:]])
    assert out["bad"].error.code == "model_failure"
    good = [i for i, prompt in enumerate(WORK) if 96 not in prompt]
    assert good and all(list(out[str(i)].token_ids) == greedy(LLAMA, WORK[i], 10) for i in good)


def test_an_exception_while_taking_a_token_fails_its_request_alone(monkeypatch):
    real = OpenRequest.accept

    def accept(self, sequence, sampled, at):
        if sequence.request.id == "3" and sequence.generated == 4:
            raise KeyError("boom")
        return real(self, sequence, sampled, at)

    monkeypatch.setattr(OpenRequest, "accept", accept)
    out = answers(make_engine(), requests())
    assert out["3"].error.code == "engine_failure" and "boom" in out["3"].error.message
    assert all(list(out[str(i)].token_ids) == greedy(LLAMA, p, 10) for i, p in enumerate(WORK) if i != 3)


def test_a_tokenizer_that_fails_fails_its_request_alone():
    broken = greedy(LLAMA, WORK[0], 10)[3]

    class Broken:
        def detokenizer(self):
            return self

        def feed(self, ids):
            if broken in ids:
                raise KeyError(broken)
            return "".join(map(chr, ids))

        def finish(self):
            return ""

    engine = make_engine(tokenizer=Broken())
    out = answers(engine, requests())
    failed = {name for name, o in out.items() if o.error is not None}
    assert all(out[name].error.code == "engine_failure" for name in failed)
    assert failed == {str(i) for i, p in enumerate(WORK) if broken in greedy(LLAMA, p, 10)}
    assert 0 < len(failed) < len(WORK)
