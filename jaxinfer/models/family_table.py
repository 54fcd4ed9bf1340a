"""The supported Hugging Face families: what sets each apart, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxinfer.models.rope_fields import PHI3_KINDS, PHIMOE_KINDS, PLAIN_ROPE, RopeFamily

_CONFIG_KEY = "attention_bias"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family apart. Defaults are those of its transformers configuration, for keys that a file leaves out.

    Attributes:
      context, kv_heads, head_dim, norm_eps, bos, eos: defaults of the file's keys; kv_heads None is as many as heads,
        head_dim None is hidden_size / heads.
      qkv_bias, out_bias: True, False, or the key that says so.
      mlp_bias, head_bias, clip_qkv: the family knows the key of that name (lm_head_bias for the head).
      window: which layers slide: none, "all" of them, "all" or "upper" ones only if use_sliding_window is true.
      expert_width: key of an expert's hidden width; None for dense families.
      renormalize: True, or the default of norm_topk_prob.
      sparse_layers: mlp_only_layers and decoder_sparse_step choose the layers that have experts.
    """

    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    bos: int | None = None
    eos: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: bool = False
    window: Literal["none", "all", "all_if_used", "upper_if_used"] = "none"
    default_window: int | None = None
    expert_width: str | None = None
    experts: int = 0
    experts_per_token: int = 2
    renormalize: bool | Literal["norm_topk_prob"] = True
    router: Literal["softmax", "sparsemixer"] = "softmax"
    sparse_layers: bool = False
    rope: RopeFamily = PLAIN_ROPE


FAMILIES: Mapping[str, Family] = {
    "llama": Family(context=2048, bos=1, eos=2, qkv_bias=_CONFIG_KEY, out_bias=_CONFIG_KEY, mlp_bias=True),
    "mistral": Family(context=131072, kv_heads=8, bos=1, eos=2, window="all", default_window=4096),
    "mixtral": Family(
        context=131072,
        kv_heads=8,
        norm_eps=1e-5,
        bos=1,
        eos=2,
        window="all",
        expert_width="intermediate_size",
        experts=8,
        rope=RopeFamily(theta=1e6),
    ),
    "qwen2": Family(context=32768, kv_heads=32, qkv_bias=True, window="upper_if_used", default_window=4096),
    "qwen3": Family(
        context=32768,
        kv_heads=32,
        head_dim=128,
        qkv_bias=_CONFIG_KEY,
        out_bias=_CONFIG_KEY,
        qk_norm="head",
        window="upper_if_used",
        default_window=4096,
    ),
    "qwen3_moe": Family(
        context=32768,
        kv_heads=4,
        qkv_bias=_CONFIG_KEY,
        out_bias=_CONFIG_KEY,
        qk_norm="head",
        window="all_if_used",
        default_window=4096,
        expert_width="moe_intermediate_size",
        experts=128,
        experts_per_token=8,
        renormalize="norm_topk_prob",
        sparse_layers=True,
    ),
    "phi3": Family(
        context=4096,
        norm_eps=1e-5,
        bos=1,
        eos=32000,
        window="all",
        rope=RopeFamily(kinds=PHI3_KINDS, partial=True, original_context=4096),
    ),
    "phimoe": Family(
        context=131072,
        kv_heads=8,
        norm_eps=1e-5,
        bos=1,
        eos=2,
        norm="layer",
        qkv_bias=_CONFIG_KEY,
        out_bias=_CONFIG_KEY,
        head_bias=True,
        window="all",
        expert_width="intermediate_size",
        experts=16,
        router="sparsemixer",
        rope=RopeFamily(kinds=PHIMOE_KINDS, theta=1e6, mscales=True),
    ),
    "olmoe": Family(
        context=4096,
        norm_eps=1e-5,
        eos=50279,
        qkv_bias=_CONFIG_KEY,
        out_bias=_CONFIG_KEY,
        qk_norm="full",
        clip_qkv=True,
        expert_width="intermediate_size",
        experts=64,
        experts_per_token=8,
        renormalize="norm_topk_prob",
    ),
}
