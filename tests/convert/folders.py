"""Test-side helpers: small Hugging Face folders, whole or damaged."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxinfer.models import tensor_table
from jaxinfer.models.families import from_hugging_face

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


def random_tensors(config=CONFIG, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {spec.name: spec.shape for spec in tensor_table(from_hugging_face(config))}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder: Path, tensors=None, config=CONFIG, shards=1) -> Path:
    tensors = random_tensors(config) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_tensors(folder: Path):
    return load_file(folder / "model.safetensors")
