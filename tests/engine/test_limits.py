"""What cannot be served, and how long an answer may be."""

import pytest
from helpers import LLAMA, answers, greedy, make_engine, request, variant

from jaxinfer.errors import ConfigError


@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "says"),
    [
        ([], {}, "empty_prompt", "no tokens"),
        ([5] * 300, {}, "context_length_exceeded", "256"),
        ([5] * 250, {"max_tokens": 10}, "context_length_exceeded", "256"),
        ([5, 97], {}, "invalid_token", "97"),
        ([5, -1], {}, "invalid_token", "-1"),
        ([5], {"logit_bias": {100: 1.0}}, "invalid_token", "100"),
        ([5], {"stop": ("x",)}, "no_tokenizer", "tokenizer"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(prompt, sampling, code, says):
    engine = make_engine()
    out = answers(engine, [request("bad", prompt, **sampling), request("good", [5, 6, 7])])
    assert out["bad"].error.code == code and says in out["bad"].error.message
    assert list(out["good"].token_ids) == greedy(LLAMA, [5, 6, 7], 8)


def test_a_request_larger_than_the_pool_is_refused_with_its_limit():
    engine = make_engine(overrides=("cache.pages=5",))
    out = answers(engine, [request("big", [5] * 60, max_tokens=10)])["big"]
    assert out.error.code == "kv_pool_exceeded" and "64" in out.error.message


def test_without_max_tokens_the_context_is_filled():
    out = answers(make_engine(), [request("a", [5] * 200, max_tokens=None)])["a"]
    assert len(out.token_ids) == 56


def test_settings_that_contradict_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"engine\.max_context = 512.*256"):
        make_engine(overrides=("engine.max_context=512",))


def test_refused_requests_come_out_as_they_are_read():
    taken = 0

    def source():
        nonlocal taken
        for taken in range(1, 1001):
            yield request(str(taken), [5] * 300)

    next(make_engine().run(source()))
    assert taken < 10


def test_an_answer_without_max_tokens_does_not_depend_on_the_pool():
    out = answers(make_engine(overrides=("cache.pages=9",)), [request("a", [5] * 20, max_tokens=None)])["a"]
    assert out.error.code == "kv_pool_exceeded" and "max_tokens" in out.error.message


def test_more_end_tokens_than_stop_tokens():
    config = variant(eos_ids=tuple(range(10, 90)))
    out = answers(make_engine(config), [request("a", [5], min_tokens=4, max_tokens=6, ignore_eos=False)])["a"]
    assert not set(out.token_ids[:4]) & set(config.eos_ids)
