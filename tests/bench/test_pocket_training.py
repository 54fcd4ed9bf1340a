"""Training the pocket model: the engine's own mathematics, learning, going on after an interruption, its tokenizer and its files."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.pocket import export, network, plan, tokenizer, train
from bench.pocket.data import Data
from jaxinfer import LLM, SamplingParams
from jaxinfer.models import decoder
from jaxinfer.models.families import from_hugging_face

TINY = train.ARCHITECTURE | {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 32,
    "vocab_size": 512,
}
MIX = {"table": 1.0, "chunks": 1.0}


@pytest.fixture(scope="module")
def words():
    return tokenizer.train(60, vocabulary=512)


@pytest.fixture(scope="module")
def data(words):
    return Data(words, seed=3)


def steps(trainer, data, count):
    for _ in range(count):
        trainer.advance(data.batch(trainer.step, 4, 128, MIX), 0.01)
    return trainer


def test_forward_is_the_engines(data):
    trainer = train.Trainer(1, architecture=TINY)
    rows = data.batch(0, 2, 256, MIX)
    ids, positions = rows.ids[:, :-1], rows.positions[:, :-1]
    ours, *_ = network.forward(trainer.model(), trainer.config, ids, positions, 4.0)

    def attend(rows, cache, layer, q, k, v, window):
        q, k, v = (x.reshape(rows, -1, *x.shape[1:]) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(-1, *q.shape[2:]), cache

    flat = jnp.asarray(positions.reshape(-1))
    theirs, _ = decoder.forward(
        trainer.model(),
        trainer.config,
        jnp.asarray(ids.reshape(-1)),
        flat,
        flat + 1,
        partial(attend, 2),
        None,
    )
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=2e-4, rtol=1e-3)


def test_attention_in_blocks_is_attention(monkeypatch, data):
    trainer = train.Trainer(1, architecture=TINY)
    rows = data.batch(0, 1, 512, MIX)
    args = (
        trainer.model(),
        trainer.config,
        rows.ids,
        rows.positions,
        rows.weights,
        rows.hints,
        trainer.params[train.PROBES],
    )

    def slope(model):
        return jax.tree.leaves(jax.grad(lambda m: network.losses(m, *args[1:]).nll)(model))

    whole = slope(args[0])
    monkeypatch.setattr(network, "KEPT", 128)
    for ours, other in zip(slope(args[0]), whole):
        np.testing.assert_allclose(ours, other, atol=1e-5, rtol=1e-3)


def test_a_full_expert_drops_tokens_and_nothing_else():
    config = from_hugging_face(TINY, None)
    layer = decoder.unstack(decoder.init(config, jax.random.key(0), jnp.float32), config).runs[0][0]
    x = jax.random.normal(jax.random.key(1), (128, 64))
    ample, *_ = network.experts(x, layer.mlp, config, 4.0)
    tight, _, _, load = network.experts(x, layer.mlp, config, 0.5)
    same = np.isclose(ample, tight, atol=1e-6).all(axis=1)
    assert 0 < same.sum() < 128
    assert np.isclose(load.sum(), 8.0)


def test_loss_falls(data):
    trainer = train.Trainer(0, architecture=TINY)
    first = next(float(trainer.advance(data.batch(0, 4, 128, MIX), 0.01)[0].nll) for _ in range(2))
    steps(trainer, data, 25)
    assert float(trainer.advance(data.batch(0, 4, 128, MIX), 0.0)[0].nll) < first - 1


def test_going_on_gives_the_same_bits(tmp_path, data):
    whole = steps(train.Trainer(0, architecture=TINY), data, 4)
    half = steps(train.Trainer(0, architecture=TINY), data, 2)
    train.Checkpoints(tmp_path).save(half)
    resumed = train.Trainer(5, architecture=TINY)
    assert train.Checkpoints(tmp_path).restore(resumed) and resumed.step == 2
    steps(resumed, data, 2)
    for name, value in whole.params.items():
        assert np.array_equal(value, resumed.params[name]), name


def test_the_plan_goes_through_its_stages():
    stages = (plan.Stage(2, ((4, 8),), (0.0, 1.0), {}), plan.Stage(3, ((1, 2), (3, 4)), (1.0, 0.0), {}))
    found = [plan.at(stages, step) for step in range(6)]
    assert [f and f[1] for f in found] == [(4, 8), (4, 8), (1, 2), (3, 4), (1, 2), None]
    assert [f and round(f[2], 2) for f in found] == [0.5, 1.0, 0.67, 0.33, 0.0, None]


def test_rows_are_the_same_for_a_step_and_stay_in_the_context(data):
    mix = {
        "chunks": 1.0,
        "lines": 1.0,
        "story": 1.0,
        "passkey": 1.0,
        "count": 1.0,
        "classify": 1.0,
        "plain": 1.0,
    }
    first, again, other = data.batch(7, 8, 512, mix), data.batch(7, 8, 512, mix), data.batch(8, 8, 512, mix)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first.ids, other.ids)
    assert (np.diff(first.positions) >= 1).all() and first.positions.max() < tokenizer.CONTEXT
    assert (first.weights == 1.0).any(axis=1).mean() > 0.5


def test_tokenizer_round_trips_and_splits_digits(words):
    for text in ("Mia paid 4711 coins.\nline a-b: <05>", "  two  spaces", "naïve – ✓"):
        encoded = words.encode(text, add_special_tokens=False)
        assert words.decode(encoded.ids) == text
    digits = [
        t for t in words.encode("x 90125", add_special_tokens=False).tokens if any(c.isdigit() for c in t)
    ]
    assert digits == list("90125")


def test_exported_folder_loads_and_answers(tmp_path, words):
    trainer = train.Trainer(0, architecture=TINY)
    export.save_hugging_face(tmp_path / "hf", trainer.model(), trainer.config, TINY)
    tokenizer.save(words, tmp_path / "hf")
    export.convert(tmp_path / "hf", tmp_path / "model", dtype="bfloat16")
    llm = LLM(tmp_path / "model")
    (out,) = llm.chat([[{"role": "user", "content": "Who?"}]], SamplingParams(max_tokens=4, temperature=0))
    assert out.error is None
    asked = [
        tokenizer.BOS,
        tokenizer.USER,
        *words.encode("Who?", add_special_tokens=False).ids,
        tokenizer.ASSISTANT,
    ]
    assert llm.tokenizer.chat([{"role": "user", "content": "Who?"}]) == asked
