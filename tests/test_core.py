"""Sampling parameters and errors as values: they travel between processes, and wrong ones say what is wrong."""

import copy
import pickle

import numpy as np
import pytest

from jaxinfer import RequestError, SamplingParams


def test_sampling_and_errors_are_plain_values():
    sampling = SamplingParams(stop=["a"], stop_token_ids=np.array([3, 4]), logit_bias={5: 1.0, 6: -2.5})
    for other in (pickle.loads(pickle.dumps(sampling)), copy.deepcopy(sampling)):
        assert other == sampling and hash(other) == hash(sampling)
        assert other.logit_bias == {6: -2.5, 5: 1.0} and list(other.logit_bias) == [5, 6]
    assert hash(SamplingParams()) == hash(SamplingParams(logit_bias=None, stop=None))
    assert sampling != SamplingParams() and not SamplingParams().logit_bias
    with pytest.raises(TypeError):
        sampling.logit_bias[5] = 2.0
    error = RequestError("invalid_value", "n: 0 is not between 1 and 128")
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (type(other), other.code, other.message) == (RequestError, error.code, error.message)
        assert str(other) == "n: 0 is not between 1 and 128"


@pytest.mark.parametrize(
    "field, value",
    [
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop", b"a"),
        ("stop", [""]),
        ("stop_token_ids", 5),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [1.5]),
        ("logit_bias", 5),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {1: float("nan")}),
        ("temperature", 10**400),
        ("temperature", 10**5000),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", None),
        ("top_p", 0),
        ("seed", 10**5000),
        ("n", True),
        ("repetition_penalty", 1e-46),
        ("repetition_penalty", 0),
        ("ignore_eos", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(RequestError, match=field) as raised:
        SamplingParams(**{field: value})
    assert raised.value.code in ("invalid_type", "invalid_value") and len(str(raised.value)) < 200


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"beam_width": 0}, "beam_width: 0 is not between 1 and 128"),
        ({"beam_width": 2.0}, "beam_width: 2.0 is not a whole number"),
        ({"beam_width": 4}, "temperature: 1.0 does not go with beam_width: 4; accepted is 0"),
        ({"beam_width": 4, "temperature": 0, "n": 5}, "n: 5 answers of 4 beams"),
        ({"beam_width": 4, "temperature": 0, "stop": "x"}, "stop: .* accepted is none"),
        ({"beam_width": 4, "temperature": 0, "logit_bias": {3: 1}}, "logit_bias: .* accepted is none"),
        ({"beam_width": 4, "temperature": 0, "presence_penalty": 1}, "presence_penalty: 1 does not go"),
        ({"beam_width": 4, "temperature": 0, "length_penalty": 6}, "length_penalty: 6 is not in"),
        ({"beam_width": 4, "temperature": 0, "early_stopping": "always"}, "early_stopping: .* is not true, false or"),
        ({"length_penalty": 0.5}, "length_penalty: 0.5 does not go with beam_width: 1; accepted is 1"),
        ({"early_stopping": True}, "early_stopping: True does not go with beam_width: 1; accepted is False"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_beam_search_is_named(fields, said):
    with pytest.raises(RequestError, match=said):
        SamplingParams(**fields)


def test_beam_search_by_its_fields():
    sampling = SamplingParams(
        beam_width=4, n=4, temperature=0, length_penalty=0, early_stopping="never", seed=3
    )
    assert pickle.loads(pickle.dumps(sampling)) == sampling
