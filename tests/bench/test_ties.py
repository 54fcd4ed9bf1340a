"""Which differences between answers are rounding, and which are faults."""

import dataclasses

import jax
import numpy as np
import pytest

from bench import workloads
from bench.ties import widest_tie
from jaxinfer.config import load_config
from jaxinfer.core import Request, SamplingParams
from jaxinfer.engine.engine import Engine
from jaxinfer.models import init, unstack

CONFIG = dataclasses.replace(
    workloads.LLAMA_110M,
    vocab_size=97, hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp_width=32, context_length=64,
    rope=dataclasses.replace(workloads.LLAMA_110M.rope, dim=16), windows=(), moe_layers=(),
)  # fmt: skip
REQUEST = Request(
    id="7",
    prompt_ids=np.array([5, 6, 7], np.int32),
    sampling=SamplingParams(max_tokens=4, temperature=0, ignore_eos=True),
)


def without(token):
    """Sampling that forbids a token."""
    return dataclasses.replace(REQUEST.sampling, logit_bias={token: -100.0})


def make_engine(model):
    settings = load_config(None, ["engine.max_seqs=2", "cache.page_size=8", "cache.pages=16"])
    return Engine(CONFIG, unstack(model, CONFIG), settings)


@pytest.fixture(scope="module")
def tied():
    """An engine, its answer to the request, and a token that its model cannot tell from the third of it."""
    model = init(CONFIG, jax.random.key(0))
    (out,) = make_engine(model).run([REQUEST])
    answer, other = out.token_ids, 96
    assert other not in answer and answer[2] not in (*answer[:2], answer[3])
    model.head = model.head.at[:, other].set(model.head[:, answer[2]])
    return make_engine(model), answer, other


def test_equal_answers_are_no_tie(tied):
    engine, answer, _ = tied
    assert widest_tie(engine, REQUEST, {"dfs": answer, "blend": answer}) == 0


def test_tokens_that_the_model_cannot_tell_apart_may_swap_and_what_follows_is_not_compared(tied):
    engine, answer, other = tied
    swapped = (*answer[:2], other, 11)
    assert widest_tie(engine, REQUEST, {"fcfs": answer, "dfs": swapped, "blend": answer}) < 1e-6


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_any_other_difference_is_a_fault(tied, place):
    engine, answer, _ = tied
    wrong = (*answer[:place], (answer[place] + 1) % 90, *answer[place + 1 :])
    with pytest.raises(AssertionError, match=f"request 7: dfs and blend differ at token {place}: "):
        widest_tie(engine, REQUEST, {"dfs": answer, "blend": wrong})


def test_the_second_likeliest_token_is_a_fault_where_it_is_clearly_less_likely(tied):
    engine, answer, _ = tied
    wrong = next(iter(engine.run([dataclasses.replace(REQUEST, sampling=without(answer[0]))]))).token_ids
    with pytest.raises(AssertionError, match="are the likeliest"):
        widest_tie(engine, REQUEST, {"dfs": answer, "blend": wrong})


def test_lengths_must_agree(tied):
    engine, answer, _ = tied
    with pytest.raises(AssertionError, match="in length, 4 and 3"):
        widest_tie(engine, REQUEST, {"dfs": answer, "blend": answer[:3]})
