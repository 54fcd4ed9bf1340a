"""The plain decoder that other choices of keys are compared with."""

import jax.numpy as jnp
import numpy as np
import pytest

from bench.dense_decoder import DenseDecoder, keep_all, sliding_window, tova
from jaxinfer.config import load_config
from jaxinfer.core import SamplingParams
from jaxinfer.llm import EMBEDDED_MODEL, LLM
from jaxinfer.models.checkpoint import load_model

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPT = "There is an important info hidden inside a lot of irrelevant text. The pass key is 52917. Remember it. The sky is blue."


@pytest.fixture(scope="module")
def decoder():
    return DenseDecoder(*load_model(EMBEDDED_MODEL, dtype="float32", layout="unstacked"), 512)


@pytest.mark.parametrize(
    "forget", [keep_all, sliding_window(512, 4), tova(512)], ids=["all", "window", "tova"]
)
def test_with_every_key_it_says_what_the_engine_says(decoder, forget):
    llm = LLM(config=load_config(None, ["model.dtype=float32"]))
    ids = llm.prompt_ids(PROMPT)
    expected = list(next(iter(llm.generate([PROMPT], GREEDY))).token_ids)
    start = len(ids) - 8
    kept = decoder.prefill(ids[: start + 1])
    assert decoder.decode(kept, start, ids[start:], 12, forget) == expected


def test_looks_are_the_keys_and_the_last_query(decoder):
    ids = LLM().prompt_ids(PROMPT)
    looks = decoder.looks(ids)
    np.testing.assert_allclose(looks[1][1], decoder.prefill(ids).keys[1], atol=1e-6)
    assert len(looks) == len(decoder.prefill(ids).keys) and looks[0][0].ndim == 2


def test_a_window_keeps_sinks_and_the_latest():
    seen = jnp.arange(20) <= 15
    kept = sliding_window(6, 2)(seen, jnp.zeros((1, 20)), 15)
    assert np.flatnonzero(kept).tolist() == [0, 1, 12, 13, 14, 15]


def test_tova_drops_what_is_attended_to_least_for_ever():
    seen = jnp.arange(10) <= 7
    weights = jnp.asarray([[5, 1, 4, 0, 3, 2, 0, 0.5, 0, 0], [0, 1, 4, 0, 3, 2, 0, 0.5, 0, 0.0]]) / 20
    kept = tova(4)(seen, weights, 7)
    assert np.flatnonzero(kept).tolist() == [0, 2, 4, 7]
    again = tova(4)(kept.at[8].set(True), jnp.ones((2, 10)).at[:, 2].set(0), 8)
    assert np.flatnonzero(again).tolist() == [0, 4, 7, 8]
