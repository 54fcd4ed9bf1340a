"""The engine's answers against one-by-one dense computation, whatever shares the batch."""

import numpy as np
import pytest
from helpers import LLAMA, MIXTRAL, answers, dense_logits, greedy, make_engine, prompts, request, variant

from jaxinfer.core import FinishReason, Request
from jaxinfer.errors import EngineError
from jaxinfer.models import RopeConfig


@pytest.mark.parametrize(
    "config", [LLAMA, MIXTRAL, variant(windows=(24, 0))], ids=["llama", "mixtral", "window"]
)
def test_a_batch_answers_as_one_by_one(config):
    work = prompts(14)
    engine = make_engine(config)
    out = answers(engine, [request(str(i), p, max_tokens=3 + i) for i, p in enumerate(work)])
    for i, p in enumerate(work):
        assert list(out[str(i)].token_ids) == greedy(config, p, 3 + i)
        assert out[str(i)].finish_reason is FinishReason.LENGTH
        assert out[str(i)].usage.prompt_tokens == len(p) and out[str(i)].usage.completion_tokens == 3 + i
    assert engine.metrics.cached_tokens > 0


def test_decode_calls_of_a_length_known_when_compiled_as_on_a_gpu(monkeypatch):
    work = prompts(5, seed=2)
    engine = make_engine(overrides=("engine.decode_steps=6",))
    monkeypatch.setattr(engine.device, "_lengths", (1, 6))
    out = answers(engine, [request(str(i), p, max_tokens=2 + 5 * i) for i, p in enumerate(work)])
    for i, p in enumerate(work):
        assert list(out[str(i)].token_ids) == greedy(LLAMA, p, 2 + 5 * i)


def test_choices_share_their_prompt_and_differ_by_draw():
    engine = make_engine()
    out = answers(engine, [request("a", np.arange(3, 53), n=4, temperature=1.0, seed=5, max_tokens=12)])["a"]
    assert [choice.index for choice in out.choices] == [0, 1, 2, 3]
    assert len({choice.token_ids for choice in out.choices}) == 4
    assert out.usage.completion_tokens == 48 and engine.metrics.computed_tokens < 50 + 3 * 16 + 48


def test_sampled_answers_depend_on_request_and_seed_alone():
    work = prompts(6, seed=3)
    make = lambda i: request(str(i), work[i], temperature=1.0, top_p=0.9, seed=i, max_tokens=20)  # noqa: E731
    together = answers(make_engine(), [make(i) for i in range(6)])
    reverse = answers(make_engine(overrides=("engine.decode_steps=1",)), [make(i) for i in range(5, -1, -1)])
    alone = answers(make_engine(), [make(4)])
    assert {k: v.token_ids for k, v in together.items()} == {k: v.token_ids for k, v in reverse.items()}
    assert alone["4"].token_ids == together["4"].token_ids


def test_end_of_sequence_and_stop_tokens():
    prompt = np.arange(3, 30)
    tokens = greedy(LLAMA, prompt, 30)
    config = variant(eos_ids=(tokens[10],))
    first = tokens.index(tokens[10])
    engine = make_engine(config)
    out = answers(engine, [request("eos", prompt, max_tokens=30, ignore_eos=False)])["eos"]
    assert list(out.token_ids) == tokens[: first + 1] and out.finish_reason is FinishReason.STOP
    out = answers(engine, [request("on", prompt, max_tokens=30)])["on"]
    assert list(out.token_ids) == tokens and out.finish_reason is FinishReason.LENGTH
    stop = tokens[5]
    out = answers(engine, [request("stop", prompt, max_tokens=30, stop_token_ids=(stop,))])["stop"]
    assert list(out.token_ids) == tokens[: tokens.index(stop) + 1] and out.finish_reason is FinishReason.STOP


def test_no_end_before_the_minimum_length():
    prompt = np.arange(3, 30)
    tokens = greedy(LLAMA, prompt, 30)
    config = variant(eos_ids=(tokens[0],))
    out = answers(make_engine(config), [request("a", prompt, min_tokens=6, max_tokens=30, ignore_eos=False)])[
        "a"
    ]
    assert tokens[0] not in out.token_ids[:6] and len(out.token_ids) >= 6


def test_penalties_survive_preemption():
    work = prompts(8, seed=6, low=20, high=40)
    make = lambda i: request(str(i), work[i], max_tokens=60, repetition_penalty=1.5, presence_penalty=0.5)  # noqa: E731
    roomy = answers(make_engine(), [make(i) for i in range(8)])
    tight = make_engine(overrides=("cache.pages=20", "cache.page_size=8"))
    again = answers(tight, [make(i) for i in range(8)])
    assert tight.metrics.preemptions > 0
    assert {k: v.token_ids for k, v in roomy.items()} == {k: v.token_ids for k, v in again.items()}
    plain = answers(make_engine(), [request("0", work[0], max_tokens=60)])
    assert plain["0"].token_ids != roomy["0"].token_ids


def test_logprobs_and_scores_are_the_models():
    prompt = np.arange(3, 60)
    engine = make_engine()
    out = answers(engine, [request("a", prompt, max_tokens=6, logprobs=3)])["a"]
    whole = np.concatenate([prompt, out.token_ids])
    expected = dense_logits(LLAMA, whole)
    expected = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    for i, token in enumerate(out.logprobs):
        at = expected[len(prompt) + i - 1]
        assert token.logprob == pytest.approx(at[token.token_id], abs=1e-4)
        assert [t for t, _ in token.top] == np.argsort(-at)[:3].tolist()
    scored = Request(id="s", prompt_ids=whole.astype(np.int32), score=True)
    out = answers(
        engine, [scored, request("b", prompt)]
    )  # beside another request, after its prefix is cached
    np.testing.assert_allclose(
        out["s"].prompt_logprobs, expected[np.arange(len(whole) - 1), whole[1:]], atol=1e-4
    )
    assert list(out["b"].token_ids) == greedy(LLAMA, prompt, 8)


@pytest.mark.parametrize("tokens", [16, 64, 96, 128])
def test_scores_of_steps_of_any_size(tokens):
    prompt = np.random.default_rng(2).integers(3, 97, 200)
    engine = make_engine(overrides=(f"engine.max_tokens_per_step={tokens}", f"engine.chunk={tokens}"))
    out = answers(engine, [Request(id="s", prompt_ids=prompt.astype(np.int32), score=True)])
    expected = dense_logits(LLAMA, prompt)
    expected = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    np.testing.assert_allclose(
        out["s"].prompt_logprobs, expected[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-4
    )


def test_nothing_is_compiled_after_warm_up():
    engine = make_engine()
    engine.warm_up()
    before = engine.metrics.compilations
    work = prompts(30, seed=7)
    mixed = [
        request(
            str(i),
            p,
            max_tokens=1 + i,
            temperature=i % 3 / 2,
            logprobs=i % 2 or None,
            top_k=i % 5,
            presence_penalty=i % 2,
            logit_bias={5: 1.0} if i % 7 == 0 else {},
        )
        for i, p in enumerate(work)
    ]
    answers(engine, mixed)
    assert engine.metrics.compilations == before


def test_closing_early_frees_everything_and_the_engine_goes_on():
    engine = make_engine()
    stream = engine.run([request(str(i), p, max_tokens=20) for i, p in enumerate(prompts(12))])
    next(stream)
    stream.close()
    engine.check_integrity()
    assert list(answers(engine, [request("a", [5, 6, 7])])["a"].token_ids) == greedy(LLAMA, [5, 6, 7], 8)


def test_an_endless_source_is_read_as_there_is_room():
    taken = 0

    def source():
        nonlocal taken
        while True:
            taken += 1
            yield request(str(taken), [5, 6, taken % 90 + 3], max_tokens=4)

    engine = make_engine()
    stream = engine.run(source())
    for _ in range(40):
        next(stream)
    assert taken <= 40 + 8 * 6
    stream.close()


def stretched(kind: str) -> RopeConfig:
    factors = {"short_factor": (1.0, 1.1, 1.2, 1.3), "long_factor": (2.0, 3.0, 4.0, 5.0)}
    more = factors if kind == "longrope" else {}
    return RopeConfig(theta=100.0, dim=8, kind=kind, factor=4.0, original_context=40, **more)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_answers_that_outgrow_the_original_context(kind, tight):
    """longrope: every key is computed anew with the long factors, as transformers' Phi-3 does. dynamic: each answer
    token is rotated for the length it had then, as transformers' cached generation does."""
    config = variant(rope=stretched(kind))
    shared = np.arange(3, 27)
    work = [np.concatenate([shared, np.full(n, 50 + n)]) for n in (1, 5, 9, 16, 17, 40, 41)]
    overrides = ("cache.pages=24", "cache.page_size=8") if tight else ()
    engine = make_engine(config, overrides)
    for _ in range(2):  # the second time with prefix hits
        out = answers(engine, [request(str(i), p, max_tokens=30) for i, p in enumerate(work)])
        for i, prompt in enumerate(work):
            tokens = list(prompt)
            for _ in range(30):
                floor = len(tokens) if kind == "longrope" else len(prompt)
                lengths = np.maximum(floor, np.arange(len(tokens)) + 1)
                tokens.append(int(dense_logits(config, tokens, lengths)[-1].argmax()))
            assert list(out[str(i)].token_ids) == tokens[len(prompt) :], f"prompt of {len(prompt)}"
    assert engine.metrics.cached_tokens > 0


def test_a_bias_ends_with_its_request():
    """A slot that a biased sequence had, beside another biased one."""
    engine = make_engine(overrides=("engine.max_seqs=2",))
    answers(engine, [request(str(i), [5, 6, 7], logit_bias={9: 100.0}) for i in range(2)])
    out = answers(engine, [request("plain", [5, 6, 7]), request("biased", [7, 8], logit_bias={11: 0.5})])
    assert list(out["plain"].token_ids) == greedy(LLAMA, [5, 6, 7], 8)


def test_two_calls_at_once_are_refused():
    engine = make_engine()
    first = engine.run([request(str(i), p) for i, p in enumerate(prompts(12))])
    next(first)
    with pytest.raises(EngineError, match="another call"):
        next(engine.run([request("b", [5])]))
    assert len(list(first)) == 11


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_launch_leaves_no_pages_that_were_never_written(monkeypatch, error):
    engine = make_engine()
    prompt = np.arange(3, 53)

    def interrupted(plan):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine.device, "launch", interrupted)
        with pytest.raises(error):
            answers(engine, [request("a", prompt)])
    out = answers(engine, [request("a", prompt)])["a"]
    assert list(out.token_ids) == greedy(LLAMA, prompt, 8) and out.usage.cached_tokens == 0
