"""Test-side helpers: golden checkpoints read through `tensor_table`, and the plainest attention with an append-only cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxinfer.models import (
    Decoder,
    ModelConfig,
    abstract,
    from_hugging_face,
    ignored,
    storage_shapes,
    tensor_table,
)

FAMILIES = Path(__file__).parents[1] / "data" / "families"
CASES = sorted(folder.name for folder in FAMILIES.iterdir() if folder.is_dir())


class Golden(NamedTuple):
    config: ModelConfig
    model: Decoder
    tokens: np.ndarray  # int32 [T]
    logits: np.ndarray  # float32 [T, V]


def load_golden(case: str) -> Golden:
    folder = FAMILIES / case
    config = from_hugging_face(json.loads((folder / "config.json").read_text()))
    storage = fill_storage(config, load_file(folder / "model.safetensors"))
    with np.load(folder / "golden.npz") as golden:
        return Golden(config, stack(config, storage), golden["tokens"], golden["logits"])


def fill_storage(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every storage array, filled from the checkpoint's tensors, every one of which must be used."""
    storage = {path: np.full(shape, np.nan, np.float32) for path, shape in storage_shapes(config).items()}
    unused = {name for name in tensors if not ignored(name, config)}
    for spec in tensor_table(config, tensors):
        assert tensors[spec.name].shape == spec.shape, spec.name
        spec.place(tensors[spec.name], storage[spec.target])
        unused.discard(spec.name)
    assert not unused
    assert not any(np.isnan(array).any() for array in storage.values())
    return storage


def stack(config: ModelConfig, storage: dict[str, np.ndarray]) -> Decoder:
    """The model of stacked runs that `storage` holds layer by layer."""
    firsts = np.cumsum([0] + [count for _, count in config.runs])

    def leaf_of(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not name.startswith("runs."):
            return jnp.asarray(storage[name])
        _, run, leaf = name.split(".", 2)
        has_experts, count = config.runs[int(run)]
        layers = range(firsts[int(run)], firsts[int(run)] + count)
        if has_experts and leaf in ("mlp.gate_up", "mlp.down"):
            part = leaf.removeprefix("mlp.")
            experts = range(shape.shape[1])
            return jnp.stack(
                [np.stack([storage[f"layers.{i}.moe.experts.{e}.{part}"] for e in experts]) for i in layers]
            )
        return jnp.stack([storage[f"layers.{i}.{leaf}"] for i in layers])

    return jax.tree_util.tree_map_with_path(leaf_of, abstract(config, "float32"))


class Cache(NamedTuple):
    """keys, values: [layers, capacity, Hkv, Dh]; filled: int32, tokens that are there already."""

    keys: jax.Array
    values: jax.Array
    filled: jax.Array


def empty_cache(config: ModelConfig, capacity: int, dtype=jnp.float32) -> Cache:
    shape = (config.layers, capacity, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))


def attend(cache: Cache, layer, q, k, v, window):
    """Appends the tokens of one sequence, then attends causally within the window."""
    keys = jax.lax.dynamic_update_slice(cache.keys, k[None], (layer, cache.filled, 0, 0))
    values = jax.lax.dynamic_update_slice(cache.values, v[None], (layer, cache.filled, 0, 0))
    group = q.shape[1] // k.shape[1]
    mine, theirs = cache.filled + jnp.arange(q.shape[0])[:, None], jnp.arange(keys.shape[1])[None]
    seen = (theirs <= mine) & ((window == 0) | (mine - theirs < window))
    wide_keys, wide_values = (jnp.repeat(a[layer], group, axis=1).astype(jnp.float32) for a in (keys, values))
    scores = jnp.einsum("thd,shd->hts", q.astype(jnp.float32), wide_keys) * q.shape[-1] ** -0.5
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("hts,shd->thd", shares, wide_values)
    return out.astype(q.dtype), Cache(keys, values, cache.filled)
