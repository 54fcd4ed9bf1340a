"""Keys and values of 8 and 4 bits inside the engine: against attention over what the codes stand for, whatever the batch."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import _attend_all, answers, make_engine, request, variant, weights
from test_sparsity import BUDGET, PAGE, SPARSE, attend_sparsely, in_bfloat16, prompts

from jaxinfer.engine.memory import MemoryPlan
from jaxinfer.errors import ConfigError
from jaxinfer.kvcache.pool import page_bytes
from jaxinfer.models import MoEConfig, forward, logits, unstack
from pallas_kernels.packed_pages import pack, unpack

LLAMA = variant(head_dim=32, layers=2)
MIXTRAL = variant(head_dim=32, family="mixtral", moe=MoEConfig(experts=4, experts_per_token=2, width=24))
BITS = {"int8": 8, "int4": 4}


def greedy(config, tokens, count, bits, attend=_attend_all):
    """The greedy answer; `attend` sees keys and values that have been packed and unpacked."""

    def stored(x):
        return unpack(*pack(x, bits), bits)

    def attend_stored(cache, layer, q, k, v, window):
        return attend(cache, layer, q, stored(k), stored(v), window)

    model, tokens = unstack(weights(config), config), list(tokens)
    for _ in range(count):
        at = jnp.arange(len(tokens))
        hidden, _ = forward(model, config, jnp.asarray(tokens, jnp.int32), at, at + 1, attend_stored, None)
        tokens.append(int(logits(model, config, hidden[-1:])[0].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_answers_are_those_of_packed_keys_and_values(config, dtype):
    engine = make_engine(config, (f"cache.dtype={dtype}",))
    for prompt in prompts(2, seed=1, high=60):
        out = answers(engine, [request("a", prompt, max_tokens=6)])["a"].token_ids
        assert list(out) == greedy(config, prompt, 6, BITS[dtype])


@pytest.mark.parametrize("dtype", BITS)
def test_pages_are_chosen_by_what_the_codes_stand_for(dtype):
    engine = make_engine(LLAMA, (*SPARSE, f"cache.dtype={dtype}"))
    prompt = prompts(1, seed=2, high=60)[0]
    out = answers(engine, [request("a", prompt, max_tokens=6)])["a"].token_ids
    attend = attend_sparsely(len(prompt), 1, 1, in_bfloat16)
    assert list(out) == greedy(LLAMA, prompt, 6, BITS[dtype], attend)
    assert len(prompt) > BUDGET


@pytest.mark.parametrize("quest", [(), SPARSE], ids=["dense", "quest"])
def test_answers_do_not_depend_on_batch_chunks_hits_or_preemption(quest):
    shared = prompts(1, seed=4, low=60, high=61)[0]
    work = [np.concatenate([shared, p[:20]]) for p in prompts(4, seed=5)] + prompts(2, seed=6)
    settings = (*quest, f"cache.page_size={PAGE}", "cache.dtype=int4")
    engine = make_engine(LLAMA, settings)
    alone = {i: answers(engine, [request("a", p, max_tokens=32)])["a"].token_ids for i, p in enumerate(work)}
    for more in [(), ("engine.chunk=7",), ("cache.pages=26",)]:
        engine = make_engine(LLAMA, (*settings, *more))
        for _ in range(2):  # the second time on what the first has left in the cache
            out = answers(engine, [request(str(i), p, max_tokens=32) for i, p in enumerate(work)])
            assert {i: out[str(i)].token_ids for i in alone} == alone, more
        assert "cache.pages=26" not in more or engine.metrics.preemptions > 0


def test_4_bits_are_not_8_bits():
    work = prompts(6, seed=7)
    requests = [request(str(i), p, max_tokens=16) for i, p in enumerate(work)]
    runs = [answers(make_engine(LLAMA, (f"cache.dtype={d}",)), requests) for d in ("auto", "int8", "int4")]
    texts = [{name: out.token_ids for name, out in run.items()} for run in runs]
    assert texts[0] != texts[2] and texts[1] != texts[2]


@pytest.mark.parametrize(
    "dtype, bytes_of_head", [("float32", 128), ("bfloat16", 64), ("int8", 36), ("int4", 20)]
)
def test_the_pool_takes_what_was_planned(dtype, bytes_of_head):
    assert (
        page_bytes(LLAMA, 16, dtype) == 2 * 2 * 2 * 16 * bytes_of_head
    )  # keys and values, layers, heads, tokens
    engine = make_engine(LLAMA, (f"cache.dtype={dtype}", "cache.pages=40"))
    plan: MemoryPlan = engine.memory
    pool = plan.make_state().pool
    arrays = (*_arrays(pool.k_pages), *_arrays(pool.v_pages))
    assert sum(a.nbytes for a in arrays) == 40 * page_bytes(LLAMA, 16, dtype)


def _arrays(pages):
    return pages if isinstance(pages, tuple) else (pages,)


def test_types_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"cache\.dtype.*int4"):
        make_engine(LLAMA, ("cache.dtype=int3",))
    with pytest.raises(ConfigError, match="15 channels, an odd number"):
        make_engine(variant(head_dim=15), ("cache.dtype=int4",))
