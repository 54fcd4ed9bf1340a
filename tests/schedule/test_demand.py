"""The counted demand of steps, against counting by brute force: every layer, token, head and key by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.attention.policy import quest_policy
from jaxinfer.config import load_config
from jaxinfer.engine.memory import MemoryPlan
from jaxinfer.models import MoEConfig, RopeConfig, init
from jaxinfer.models.config import ModelConfig
from jaxinfer.quant.form import quantization
from jaxinfer.schedule.demand import Demand, DemandModel, Span

LLAMA = ModelConfig(
    family="llama",
    vocab_size=101,
    hidden_size=24,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=4,
    mlp_width=40,
    context_length=64,
    rope=RopeConfig(theta=10000.0, dim=4),
)


def variant(**changes) -> ModelConfig:
    return dataclasses.replace(LLAMA, **{"windows": (), "moe_layers": ()} | changes)


EXPERTS = MoEConfig(experts=7, experts_per_token=3, width=10)
MODELS = {
    "dense": LLAMA,
    "tied": variant(tie_embeddings=True),
    "biases": variant(qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True, norm="layer"),
    "windows": variant(windows=(5, 0, 1)),
    "experts": variant(moe=EXPERTS),
    "mixed layers": variant(moe=EXPERTS, moe_layers=(True, False, True), windows=(9, 9, 0)),
}
WIDTH = {"bfloat16": 2, "float32": 4}


def counted(config: ModelConfig, dtype: str, spans: list[Span]) -> Demand:
    """One pass, nothing summed up in advance."""
    flops = moved = 0
    for layer in range(config.layers):
        window = config.windows[layer] or 10**9
        for start, count, *_ in spans:
            positions = range(start, start + count)
            seen = [{key for key in range(at + 1) if at - key < window} for at in positions]
            for keys in seen:
                flops += 2 * config.hidden_size * (config.heads + 2 * config.kv_heads) * config.head_dim
                for _ in range(config.heads):
                    flops += len(keys) * 2 * (2 * config.head_dim)
                flops += 2 * config.heads * config.head_dim * config.hidden_size
                if config.moe_layers[layer]:
                    flops += 2 * config.hidden_size * config.moe.experts
                    for _ in range(config.moe.experts_per_token):
                        flops += 3 * 2 * config.hidden_size * config.moe.width
                else:
                    flops += 3 * 2 * config.hidden_size * config.mlp_width
            for _ in range(config.kv_heads):
                moved += (len(set().union(*seen)) + count) * 2 * config.head_dim
    for _, _, logits, *_ in spans:
        flops += logits * 2 * config.hidden_size * config.vocab_size
    return Demand(flops, weights_read(config, spans) * WIDTH[dtype], moved * WIDTH[dtype])


def weights_read(config: ModelConfig, spans: list[Span]) -> int:
    """From the arrays of a model that exists."""
    model = init(config, jax.random.key(0), jnp.float32)
    tokens = sum(span.tokens for span in spans)
    read = tokens * config.hidden_size
    for run in model.runs:
        for leaf in jax.tree.leaves(run):
            array = np.asarray(leaf)
            experts = config.moe is not None and array.ndim > 3 and config.moe.experts == array.shape[1]
            if experts:
                array = array[:, : tokens * config.moe.experts_per_token]
            read += array.size
    read += sum(leaf.size for leaf in jax.tree.leaves(model.norm))
    if any(span.logits for span in spans):
        head = model.embed if model.head is None else model.head
        read += head.size + (0 if model.head_bias is None else model.head_bias.size)
    return read


@st.composite
def some_spans(draw):
    start, count = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    return Span(start, count, draw(st.integers(0, count)))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None)
@given(spans=st.lists(some_spans(), min_size=1, max_size=5))
def test_a_step_counts_what_brute_force_counts(name, spans):
    assert DemandModel(MODELS[name], "bfloat16").step(spans) == counted(MODELS[name], "bfloat16", spans)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=5))
def test_a_decode_call_is_the_sum_of_its_passes(name, rows):
    model = DemandModel(MODELS[name], "float32")
    passes = [
        counted(MODELS[name], "float32", [Span(start + i, 1, 1) for start, count in rows if i < count])
        for i in range(max(count for _, count in rows))
    ]
    total = Demand(*(sum(column) for column in zip(*passes)))
    assert model.decode([Span(start, count, count) for start, count in rows]) == total
    assert total.bytes == total.weight_bytes + total.kv_bytes


def test_nothing_asks_for_nothing():
    model = DemandModel(LLAMA, "float32")
    assert model.step([]) == model.decode([]) == Demand(0, 0, 0)


def test_a_prompt_in_chunks_takes_the_same_operations_and_reads_weights_once_a_chunk():
    model = DemandModel(MODELS["windows"], "float32")
    whole = model.step([Span(0, 30)])
    chunks = [model.step([Span(start, 10, int(start == 20))]) for start in (0, 10, 20)]
    assert sum(chunk.flops for chunk in chunks) == whole.flops
    assert sum(chunk.weight_bytes for chunk in chunks) > 2 * whole.weight_bytes


def served(*overrides, config=LLAMA):
    """The demand model that an engine of these settings has."""
    settings = load_config(None, overrides)
    quest = quest_policy(settings, config.context_length)
    plan = MemoryPlan.make(config, settings, quest)
    return plan, quest, plan.demand(settings)


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_packed_keys_count_as_the_bytes_that_the_pool_stores(kind):
    plan, _, model = served(f"cache.dtype={kind}", "cache.pages=9")
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(plan.make_state().pool)) / 9 / plan.page_size
    assert model.step([Span(19, 1)]).kv_bytes == (20 + 1) * stored  # 20 read, one written


@pytest.mark.parametrize("mode", ["shared", "kernel", "paper"])
@settings(max_examples=25, deadline=None)
@given(spans=st.lists(some_spans(), min_size=1, max_size=4), start=st.integers(0, 400))
def test_sparse_tokens_count_what_they_choose_layer_by_layer(mode, spans, start):
    config = dataclasses.replace(LLAMA, layers=4, context_length=1024, windows=(0, 0, 6, 0), moe_layers=())
    overrides = ("cache.page_size=8", "cache.pages=9", "sparsity.token_budget=32", "model.dtype=float32")
    _, quest, model = served(f"sparsity.mode={mode}", *overrides, config=config)
    spans = [
        span._replace(start=start + span.start, sparse=index % 2 == 0) for index, span in enumerate(spans)
    ]
    key, bound = 2 * 2 * 4 * 4, 2 * 2 * 4 * (2 if mode == "shared" else 4)  # bytes of a token, and of a page
    readers = 1 if mode == "shared" else 3  # query heads that choose by themselves, per KV head
    dense, moved = DemandModel(config, "float32"), 0
    for span in spans:
        if not span.sparse:
            moved += dense.decode([span]).kv_bytes
            continue
        for position in range(span.start, span.start + span.tokens):
            keys = position + 1
            for window in (0, 0, 6):  # two layers that are dense by policy, and one with a window
                moved += key * (1 + min(keys, window or keys))
            if keys <= quest.dense_tokens:
                moved += key * (1 + keys)
            else:
                moved += key * (1 + readers * min(keys, 32)) + bound * -(-keys // 8)
    assert model.decode(spans).kv_bytes == moved
    fewer = dense.step([Span(400, 1)]).flops - model.step([Span(400, 1, sparse=True)]).flops
    assert fewer == 4 * 6 * 4 * (401 - 32)


def test_offloaded_experts_come_over_the_link_as_far_as_they_have_no_slot():
    config = variant(moe=EXPERTS, hidden_size=128, moe_layers=(True, False, True))
    config = dataclasses.replace(config, moe=dataclasses.replace(EXPERTS, width=128))
    whole = DemandModel(config, "float32")
    half = DemandModel(config, "float32", expert_slots=7)
    expert = 3 * 128 * 128 * 4
    for tokens, touched in ((1, 3), (2, 6), (9, 7)):
        span = [Span(0, tokens)]
        assert whole.step(span).link_bytes == 0
        assert half.step(span).link_bytes == touched * 2 * expert / 2
        assert half.step(span)[:3] == whole.step(span)[:3]
    assert half.decode([Span(0, 4), Span(0, 1)]).link_bytes == (6 + 3 * 3) * expert
    small = DemandModel(config, "float32", expert_slots=14, expert_bytes=expert // 8)
    assert small.step([Span(0, 9)]).link_bytes == 0
    assert small.step([Span(0, 9)]).weight_bytes < whole.step([Span(0, 9)]).weight_bytes / 2


def test_quantized_weights_count_as_they_are_stored():
    config = variant(hidden_size=256, mlp_width=512, head_dim=64, heads=4, kv_heads=4, vocab_size=32)
    low = dataclasses.replace(config, quantization=quantization("atom-w4a8", config))
    full, packed = (DemandModel(each, "bfloat16").step([Span(0, 1)]) for each in (config, low))
    assert 2.5 < full.weight_bytes / packed.weight_bytes < 4 and full.flops == packed.flops


def test_llama_3_8b_has_the_published_key_width_and_parameters():
    """BlendServe's own numbers: 4 bytes of key and value for each of 1024 channels of 32 layers and token; 2 flops a weight."""
    config = variant(
        vocab_size=128256,
        hidden_size=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp_width=14336,
        context_length=8192,
        rope=RopeConfig(theta=500000.0, dim=128),
    )
    model = DemandModel(config, "bfloat16")
    one, later = model.decode([Span(0, 1)]), model.decode([Span(1000, 1)])
    assert later.kv_bytes - one.kv_bytes == 1000 * 1024 * 32 * 4
    assert one.flops == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=0.001)
    assert one.weight_bytes == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=0.001)
