"""The decoder's contract with the engine: shapes from one description, both forms of its layers, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import attend, empty_cache, load_golden

from jaxinfer.models import abstract, forward, init, logits, unstack
from jaxinfer.models.moe import moe

CASES = ["llama_biases", "qwen3_moe_mixed", "phimoe", "olmoe"]


def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def test_parameter_tree():
    """Names and shapes that converters, shardings and checkpoints rely on."""
    mixed = shapes(abstract(load_golden("qwen3_moe_mixed").config))  # experts, one dense layer, experts
    assert mixed == {
        "embed": (64, 32),
        "head": (32, 64),
        "norm.scale": (32,),
        **{
            f"runs.{run}.{name}": (1, *shape)
            for run in range(3)
            for name, shape in {
                "attn_norm.scale": (32,),
                "attention.qkv": (32, 2, 4, 8),
                "attention.out": (4, 8, 32),
                "attention.q_norm": (8,),
                "attention.k_norm": (8,),
                "mlp_norm.scale": (32,),
                **({"mlp.router": (32, 5)} if run != 1 else {}),
                "mlp.gate_up": (32, 2, 24) if run == 1 else (5, 32, 2, 12),
                "mlp.down": (24, 32) if run == 1 else (5, 12, 32),
            }.items()
        },
    }
    biases = shapes(abstract(load_golden("llama_biases").config))
    assert biases["runs.0.attention.qkv_bias"] == (2, 2, 4, 8)
    assert biases["runs.0.attention.out_bias"] == (2, 32)
    assert biases["runs.0.mlp.gate_up_bias"] == (2, 2, 24)
    assert biases["runs.0.mlp.down_bias"] == (2, 32)
    assert shapes(abstract(load_golden("olmoe").config))["runs.0.attention.q_norm"] == (2, 4, 8)
    phimoe = shapes(abstract(load_golden("phimoe").config))
    assert (phimoe["head_bias"], phimoe["norm.bias"], phimoe["runs.0.mlp_norm.bias"]) == (
        (64,),
        (32,),
        (2, 32),
    )
    assert "head" not in shapes(abstract(load_golden("llama_tied").config))


def test_init_weights_are_normal_and_independent():
    config = load_golden("llama2").config
    model, expected = init(config, jax.random.key(0)), abstract(config)
    assert (jax.tree.structure(model), shapes(model)) == (jax.tree.structure(expected), shapes(expected))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    gate_up = np.asarray(model.runs[0].mlp.gate_up)
    assert gate_up.std() == pytest.approx(0.02, rel=0.05)
    assert abs(np.corrcoef(gate_up[0].ravel(), gate_up[1].ravel())[0, 1]) < 0.1
    assert (np.asarray(model.norm.scale) == 1).all()


@pytest.mark.parametrize("case", CASES)
def test_both_forms_visit_the_same_layers_in_order(case):
    config, model, tokens, _ = load_golden(case)

    def visit(cache, layer, q, k, v, window):
        visited, at = cache
        return q, (visited.at[at].set(jnp.stack((layer, window))), at + 1)

    @jax.jit
    def run(model):
        positions = jnp.arange(len(tokens))
        cache = jnp.full((config.layers, 2), -1, jnp.int32), 0
        return forward(model, config, tokens, positions, positions + 1, visit, cache)

    (stacked, (visited, _)), (single, (again, _)) = run(model), run(unstack(model, config))
    np.testing.assert_array_equal(visited, np.stack((np.arange(config.layers), config.windows), -1))
    np.testing.assert_array_equal(visited, again)
    np.testing.assert_allclose(stacked, single, atol=1e-5)


def test_padding_visits_no_expert():
    config, model, *_ = load_golden("mixtral")
    block = jax.tree.map(lambda leaf: leaf[0], model.runs[0].mlp)
    x = jax.random.normal(jax.random.key(0), (6, config.hidden_size))
    valid = np.array([True, False, True, True, False, False])
    (out, _), (all_real, _) = moe(x, block, config, valid), moe(x, block, config, None)
    np.testing.assert_allclose(out[valid], all_real[valid], atol=1e-6)
    assert (np.asarray(out)[~valid] == 0).all()


def test_hidden_states_keep_the_parameters_type_and_logits_are_float32():
    config, model, tokens, _ = load_golden("qwen2")
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    positions = np.arange(len(tokens), dtype=np.int32)
    cache = empty_cache(config, len(tokens), jnp.bfloat16)
    hidden, cache = forward(model, config, tokens, positions, positions + 1, attend, cache)
    assert (hidden.dtype, cache.keys.dtype) == (jnp.bfloat16, jnp.bfloat16)
    scores = logits(model, config, hidden[-2:])
    assert (scores.shape, scores.dtype) == ((2, config.vocab_size), jnp.float32)
