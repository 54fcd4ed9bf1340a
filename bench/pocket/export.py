"""The trained model as a Hugging Face folder of MixtralForCausalLM, and converted: `python -m bench.pocket.export`."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from bench.pocket import tokenizer
from bench.pocket.train import ARCHITECTURE, Checkpoints, Trainer, load_tokenizer
from convert.convert import convert
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder


def tensors(model: Decoder, config: ModelConfig) -> dict[str, np.ndarray]:
    """bfloat16 weights under the names of the hub's Mixtral."""
    named: dict[str, Any] = {
        "model.embed_tokens.weight": model.embed,
        "model.norm.weight": model.norm.scale,
        "lm_head.weight": model.head.T if model.head is not None else model.embed,
    }
    for index, layer in enumerate(layer for run in model.runs for layer in run):
        group, wide = config.group, config.hidden_size
        qkv = layer.attention.qkv  # [D, Hkv, G + 2, Dh]
        parts = {
            "input_layernorm": layer.attn_norm.scale,
            "post_attention_layernorm": layer.mlp_norm.scale,
            "self_attn.q_proj": qkv[:, :, :group].reshape(wide, -1).T,
            "self_attn.k_proj": qkv[:, :, group].reshape(wide, -1).T,
            "self_attn.v_proj": qkv[:, :, group + 1].reshape(wide, -1).T,
            "self_attn.o_proj": layer.attention.out.reshape(-1, wide).T,
            "block_sparse_moe.gate": layer.mlp.router.T,
        }
        for expert in range(layer.mlp.down.shape[0]):
            name = f"block_sparse_moe.experts.{expert}"
            parts[f"{name}.w1"] = layer.mlp.gate_up[expert, :, 0].T
            parts[f"{name}.w3"] = layer.mlp.gate_up[expert, :, 1].T
            parts[f"{name}.w2"] = layer.mlp.down[expert].T
        named |= {f"model.layers.{index}.{name}.weight": part for name, part in parts.items()}
    return {n: np.ascontiguousarray(np.asarray(t).astype(ml_dtypes.bfloat16)) for n, t in named.items()}


def save_hugging_face(
    folder: Path, model: Decoder, config: ModelConfig, architecture: Mapping[str, Any] = ARCHITECTURE
) -> None:
    """config.json, generation_config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    described = dict(architecture) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(described, indent=1))
    ends = {"bos_token_id": architecture["bos_token_id"], "eos_token_id": architecture["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    save_file(tensors(model, config), folder / "model.safetensors", metadata={"format": "pt"})


def export(training: Path, out: Path) -> int:
    """Writes out/hugging-face and out/model from the newest checkpoint; returns its step."""
    trainer = Trainer(0)
    if not Checkpoints(training / "checkpoints").restore(trainer):
        raise SystemExit(f"{training}: no checkpoint")
    source = out / "hugging-face"
    shutil.rmtree(source, ignore_errors=True)
    save_hugging_face(source, trainer.model(), trainer.config)
    tokenizer.save(load_tokenizer(training), source)
    convert(source, out / "model", dtype="bfloat16", overwrite=True)
    return trainer.step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pocket.export", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of the training")
    parser.add_argument("--out", type=Path, required=True, help="gets hugging-face/ and model/")
    options = parser.parse_args(argv)
    print(f"step {export(options.folder, options.out)} in {options.out}")


if __name__ == "__main__":
    main()
