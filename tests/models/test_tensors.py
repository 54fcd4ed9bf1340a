"""The tables that place checkpoint tensors: complete, without overlap, and the same model from every layout."""

import jax
import numpy as np
import pytest
from checkpoint_helpers import CASES, fill_storage, load_golden, stack

from jaxinfer.models import ignored, storage_shapes, tensor_table

FUSED = {"mixtral": "mlp.gate", "phimoe": "mlp.router", "qwen3_moe_mixed": "mlp.gate", "olmoe": "mlp.gate"}


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_read_once_and_written_once(case):
    config = load_golden(case).config
    read: dict[str, np.ndarray] = {}
    written = {path: np.zeros(shape, int) for path, shape in storage_shapes(config).items()}
    for spec in tensor_table(config):
        tensor = read.setdefault(spec.name, np.zeros(spec.shape, int))
        tensor[spec.source] += 1
        written[spec.target][spec.slot] += spec.read(np.ones(spec.shape, int))
    assert all((count == 1).all() for counts in (read, written) for count in counts.values())


@pytest.mark.parametrize("case", FUSED)
def test_fused_experts_give_the_same_model(case):
    """The layout that transformers 5 has in memory, against the hub's experts one by one."""
    config, model, *_ = load_golden(case)
    tensors: dict[str, np.ndarray] = {}
    storage = storage_of(config, model)
    experts = {f"layers.{i}." for i, has in enumerate(config.moe_layers) if has}
    names = {f"model.{layer}mlp.experts.gate_up_proj" for layer in experts}
    names |= {f"model.{layer}{FUSED[case]}.weight" for layer in experts}
    for spec in tensor_table(config, names):
        piece = storage[spec.target][spec.slot].transpose(np.argsort(spec.axes))
        tensor = tensors.setdefault(spec.name, np.zeros(spec.shape, np.float32))
        tensor[spec.source] = piece.reshape(tensor[spec.source].shape)
    assert names <= set(tensors)
    again = stack(config, fill_storage(config, tensors))
    jax.tree.map(np.testing.assert_array_equal, again, model)


def storage_of(config, model):
    """Storage, layer by layer, of a stacked model."""
    storage = {}
    for path in storage_shapes(config):
        if not path.startswith("layers."):
            leaf = model
            for name in path.split("."):
                leaf = getattr(leaf, name)
            storage[path] = np.asarray(leaf)
            continue
        _, layer, *names = path.split(".")
        run, within = run_of(config, int(layer))
        leaf = model.runs[run]
        if names[0] == "moe":
            storage[path] = np.asarray(getattr(leaf.mlp, names[3])[within, int(names[2])])
            continue
        for name in names:
            leaf = getattr(leaf, name)
        storage[path] = np.asarray(leaf[within])
    return storage


def run_of(config, layer):
    for run, (_, count) in enumerate(config.runs):
        if layer < count:
            return run, layer
        layer -= count
    raise AssertionError


def test_what_may_be_ignored():
    tied, untied = load_golden("llama_tied").config, load_golden("llama1").config
    assert ignored("lm_head.weight", tied)
    assert not ignored("lm_head.weight", untied)
    assert ignored("model.layers.0.self_attn.rotary_emb.inv_freq", untied)
    assert not ignored("model.layers.0.self_attn.q_proj.weight", untied)
