"""Regenerates tests/data/families: tiny random checkpoints and the logits that transformers gives for them.

Run with an environment that has torch and transformers (the data kept here: torch 2.13, transformers 5.23):

    python tests/data/make_families.py [case ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "families"
PROMPT = 36  # tokens; beyond every window and every original context below
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wide, so that the logits are of order 1 and a wrong block shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.0, 3.5, 6.0],
    "original_max_position_embeddings": 16,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12}
QWEN_MOE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
PHIMOE = {**MOE, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.3}
PHIMOE_ROPE = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4}


def llama(**changes):
    return transformers.LlamaConfig(**{**COMMON, **changes})


def rope(kind: str, **changes):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **changes}}


def phi3(**changes):
    return transformers.Phi3Config(**{**COMMON, **changes})


def phi3_long(**changes):
    return phi3(rope_parameters=dict(LONGROPE), original_max_position_embeddings=16, **changes)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama1": (lambda: llama(num_key_value_heads=4), {}),
    "llama2": (lambda: llama(num_hidden_layers=3), {}),
    "llama3": (lambda: llama(rope_parameters=LLAMA3), {}),
    "llama_linear": (lambda: llama(**rope("linear", factor=2.5)), {}),
    "llama_dynamic": (lambda: llama(**rope("dynamic", factor=4.0), max_position_embeddings=16), {}),
    "llama_yarn": (
        lambda: llama(**rope("yarn", factor=4.0, original_max_position_embeddings=16), head_dim=16),
        {},
    ),
    "llama_yarn_mscale": (
        lambda: llama(
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                mscale=1.0,
                mscale_all_dim=0.5,
                beta_fast=8,
                beta_slow=0.5,
                truncate=False,
            ),
            head_dim=16,
        ),
        {},
    ),
    "llama_longrope": (lambda: llama(rope_parameters={**LONGROPE, "rope_theta": 10000.0}), {}),
    "llama_mqa": (lambda: llama(num_key_value_heads=1, head_dim=16), {}),
    "llama_tied": (lambda: llama(tie_word_embeddings=True), {}),
    "llama_biases": (lambda: llama(attention_bias=True, mlp_bias=True), {}),
    "llama_gelu": (lambda: llama(hidden_act="gelu_pytorch_tanh"), {}),
    "mistral": (lambda: transformers.MistralConfig(**COMMON, sliding_window=12, head_dim=16), {}),
    "mixtral": (lambda: transformers.MixtralConfig(**{**COMMON, **MOE}), {}),
    "mixtral_window": (lambda: transformers.MixtralConfig(**{**COMMON, **MOE}, sliding_window=12), {}),
    "qwen2": (lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True), {}),
    "qwen2_window": (
        lambda: transformers.Qwen2Config(
            **{**COMMON, "num_hidden_layers": 3},
            use_sliding_window=True,
            sliding_window=12,
            max_window_layers=1,
        ),
        {},
    ),
    "qwen3": (lambda: transformers.Qwen3Config(**COMMON, head_dim=16), {}),
    "qwen3_moe": (lambda: transformers.Qwen3MoeConfig(**COMMON, **QWEN_MOE, norm_topk_prob=True), {}),
    "qwen3_moe_mixed": (
        lambda: transformers.Qwen3MoeConfig(
            **{**COMMON, "num_hidden_layers": 3}, **QWEN_MOE, norm_topk_prob=False, mlp_only_layers=[1]
        ),
        {},
    ),
    "phi3": (lambda: phi3(sliding_window=24), {}),
    "phi3_longrope_short": (phi3_long, {"prompt": 16}),
    "phi3_longrope_long": (phi3_long, {}),
    "phi3_partial": (
        lambda: phi3(
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={**LONGROPE, "partial_rotary_factor": 0.5},
            original_max_position_embeddings=16,
        ),
        {},
    ),
    "phimoe": (lambda: transformers.PhimoeConfig(**{**COMMON, **PHIMOE}), {}),
    "phimoe_longrope_short": (
        lambda: transformers.PhimoeConfig(**{**COMMON, **PHIMOE}, rope_parameters=dict(PHIMOE_ROPE)),
        {"prompt": 16},
    ),
    "phimoe_longrope_long": (
        lambda: transformers.PhimoeConfig(**{**COMMON, **PHIMOE}, rope_parameters=dict(PHIMOE_ROPE)),
        {},
    ),
    "olmoe": (
        lambda: transformers.OlmoeConfig(**{**COMMON, **MOE}, norm_topk_prob=False),
        {},
    ),
    "olmoe_clip": (
        lambda: transformers.OlmoeConfig(**{**COMMON, **MOE}, norm_topk_prob=True, clip_qkv=0.7),
        {},
    ),
}


def make(case: str) -> None:
    config_of, options = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    config = config_of()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.2)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
        tokens = torch.randint(3, config.vocab_size, (options.get("prompt", PROMPT),))
        logits = model(tokens[None]).logits[0].float().numpy()
    folder = FOLDER / case
    model.save_pretrained(folder)
    np.savez_compressed(folder / "golden.npz", tokens=tokens.numpy().astype(np.int32), logits=logits)
    print(f"{case:24} logits std {logits.std():.2f}")


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        make(name)
