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
