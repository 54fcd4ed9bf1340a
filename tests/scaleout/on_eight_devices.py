"""Runs on a mesh against runs on one device. `test_mesh.py` starts this file in a process that has eight simulated devices."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from meshes import EXPERTS, LLAMA, QUEST, ROWS, TOKENS, Case, answers, exchanges, ids, placed, programs

from convert.convert import convert
from jaxinfer import SamplingParams, load_config
from jaxinfer.models.checkpoint import load_model
from jaxinfer.scaleout.mesh import spread_over

assert len(jax.devices()) == 8, "see test_mesh.py"
FAMILIES = Path(__file__).parents[1] / "data" / "families"
PAPER = ("sparsity.token_budget=32", "sparsity.dense_layers=0", "sparsity.mode=paper", "cache.page_size=8")
PACKED_KEYS = (*QUEST, "sparsity.bounds=int8", "cache.dtype=int4")
EIGHT_EXPERTS = replace(LLAMA, **EXPERTS)


def on_each_device(tree) -> list[int]:
    """Bytes of the arrays, device by device."""
    held = dict.fromkeys(jax.tree.leaves(tree)[0].sharding.device_set, 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


def check_even(engine, alone) -> None:
    """Every device has as much, as planned; of KV heads no more than its part, unless there are too few of them."""
    weights = on_each_device(engine.device._weights)
    assert set(weights) == {engine.memory.weight_bytes}
    pool, whole = on_each_device(engine.device._state.pool), on_each_device(alone.device._state.pool)[0]
    shares = math.gcd(engine.device._spread.heads.parts, engine.config.kv_heads)
    assert engine.memory.pages == alone.memory.pages
    assert set(pool) == {whole // shares}


def check_exchanges(engine, packed: bool) -> None:
    """Nothing is exchanged but activations: no weight, no part of the pool, no row of the vocabulary."""
    config, heads = engine.config, engine.device._spread.heads
    sparsity = engine.settings.sparsity
    chosen_together = heads.copies > 1 and sparsity.token_budget > 0 and sparsity.mode == "shared"
    for tokens, text in zip((TOKENS, ROWS), programs(engine), strict=True):
        found = set(exchanges(text))
        assert ("all-reduce", (tokens, config.hidden_size)) in found
        for kind, shape in found:
            rows = {tokens, ROWS} | ({tokens * config.moe.experts_per_token} if config.moe else set())
            assert kind in ("all-reduce", "all-gather") and shape[0] in rows, (kind, shape)
            assert math.prod(shape[1:]) < config.vocab_size
            if kind == "all-gather" and not packed:
                assert chosen_together and shape == (ROWS, config.heads, config.head_dim)
        assert bool([kind for kind, _ in found if kind == "all-gather"]) == (packed or chosen_together)


def check(case: Case, *meshes: str) -> None:
    alone = case.engine()
    expected = ids(answers(alone))
    assert len({tuple(answer) for answer in expected}) == len(expected)
    for mesh in meshes:
        engine = case.engine(mesh)
        assert ids(answers(engine)) == expected, mesh
        check_even(engine, alone)
        check_exchanges(engine, bool(case.mode))


def test_a_llama_whose_kv_heads_are_fewer_than_devices_with_quest():
    check(Case(LLAMA, QUEST), "{tensor=8}")


def test_packed_experts_on_both_axes_with_quest():
    check(Case(EIGHT_EXPERTS, QUEST, "atom-w4a8"), "{tensor=2, expert=2}")


def test_a_checkpoint_is_restored_straight_into_shares(tmp_path):
    convert(FAMILIES / "mixtral", tmp_path / "mixtral", dtype="float32")
    config, whole = load_model(tmp_path / "mixtral", layout="unstacked")
    spread = spread_over(config, load_config(None, ["engine.mesh={tensor=4, expert=2}"]))
    _, shares = load_model(tmp_path / "mixtral", layout="unstacked", sharding=spread.place)
    jax.tree.map(np.testing.assert_array_equal, shares, placed(spread.place, whole))
    qkv, heads = shares.runs[0][0].attention.qkv, whole.runs[0][0].attention.qkv  # of 4 query and 2 KV heads
    for device, shard in enumerate(sorted(qkv.addressable_shards, key=lambda shard: shard.device.id)):
        head = device // 2  # each is on two devices along "expert"
        own = heads[:, head // 2 : head // 2 + 1, [head % 2, 2, 3]]
        np.testing.assert_array_equal(shard.data, own)


MESHES = "{tensor=2}", "{tensor=4}", "{tensor=8}"
EXPERT_MESHES = "{expert=2}", "{expert=4}", "{tensor=4, expert=2}", "{tensor=2, expert=4}", "{expert=8}"
MODES = "", "atom-w4a4", "atom-w4a8", "w8a8", "w4a16"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [(), QUEST, PAPER, PACKED_KEYS], ids=["dense", "quest", "paper", "int4"]
)
@pytest.mark.parametrize("mode", MODES)
def test_llamas(mode, overrides):
    check(Case(LLAMA, overrides, mode), *MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), QUEST], ids=["dense", "quest"])
@pytest.mark.parametrize("mode", MODES)
def test_mixtrals(mode, overrides):
    check(Case(EIGHT_EXPERTS, overrides, mode), "{tensor=2}", *EXPERT_MESHES)


ASKED = [
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=3, max_tokens=12, ignore_eos=True, logprobs=5),
    SamplingParams(temperature=1.0, seed=4, max_tokens=12, ignore_eos=True),
    SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.5, logit_bias={7: 9, 200: 9}
    ),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, min_p=0.1),
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, beam_width=3, n=3),
]


@pytest.mark.slow
def test_everything_that_can_be_asked_for():
    case, found = Case(LLAMA), []
    for mesh in (None, "{tensor=4}"):
        engine = case.engine(mesh)
        before = [(leaf.sharding, leaf.ndim) for leaf in jax.tree.leaves(engine.device._state)]
        out = [*answers(engine, ASKED[:4] + ASKED[3:4]), answers(engine, ASKED[4:] * ROWS)[0]]
        scored = answers(engine, score=True)
        found.append((out, scored))
        after = [leaf.sharding for leaf in jax.tree.leaves(engine.device._state)]
        assert all(was.is_equivalent_to(now, axes) for (was, axes), now in zip(before, after))
    (alone, alone_scored), (spread, spread_scored) = found
    assert ids(spread) == ids(alone)
    for one, other in zip(alone, spread):
        assert [c.token_ids for c in one.choices] == [c.token_ids for c in other.choices]
        for mine, theirs in zip(one.choices[0].logprobs or (), other.choices[0].logprobs or (), strict=True):
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
            np.testing.assert_allclose([p for _, p in mine.top], [p for _, p in theirs.top], atol=1e-4)
    for one, other in zip(alone_scored, spread_scored, strict=True):
        np.testing.assert_allclose(one.prompt_logprobs, other.prompt_logprobs, atol=1e-4)
