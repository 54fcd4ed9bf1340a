"""Reads the config.json of the supported Hugging Face families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jaxinfer.models.config import ModelConfig, MoEConfig
from jaxinfer.models.family_table import FAMILIES, Family
from jaxinfer.models.fields import Fields, first_present
from jaxinfer.models.rope_fields import read_rope
from jaxinfer.models.serialized import from_json, to_json

_Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
_ACTIVATIONS: dict[str, _Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_EXPERT_ACTIVATIONS: dict[str, _Activation] = {
    name: ours for name, ours in _ACTIVATIONS.items() if ours in ("silu", "gelu_tanh")
}
# No float16 on board: its range fails where bfloat16's does not, and accelerators multiply both at one speed.
_DTYPES: dict[str, Literal["float32", "bfloat16"]] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
}
_DTYPES |= {f"torch.{name}": ours for name, ours in _DTYPES.items()}
# Far beyond any model, near enough that a corrupt file cannot make us build a tuple of a billion layers.
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 100_000


def from_hugging_face(
    config_json: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The model that a Hugging Face config.json describes.

    Args:
      config_json: the file's content.
      generation_config: content of generation_config.json, for its end-of-sequence tokens.

    Raises:
      ModelError: an unknown family or setting, or a value that is missing, of the wrong type or impossible.
    """
    fields = Fields(config_json, "config.json")
    family = fields.choice("model_type", FAMILIES)
    _refuse_other_kinds(fields)
    heads = fields.whole("num_attention_heads")
    kv_heads = _kv_heads(fields, family, heads)
    head_dim = _head_dim(fields, family, heads)
    context = fields.whole("max_position_embeddings", family.context)
    rope, reach = read_rope(fields, family.rope, head_dim, context)
    layers = fields.whole("num_hidden_layers", high=_MOST_LAYERS)
    moe, moe_layers = _moe(fields, family, layers)
    vocab = fields.whole("vocab_size")
    return ModelConfig(
        family=fields.values["model_type"],
        vocab_size=vocab,
        hidden_size=fields.whole("hidden_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=fields.whole("intermediate_size"),
        context_length=reach,
        rope=rope,
        norm=family.norm,
        norm_eps=fields.real("rms_norm_eps", family.norm_eps),
        activation=fields.choice("hidden_act", _EXPERT_ACTIVATIONS if moe else _ACTIVATIONS, "silu"),
        qkv_bias=_bias(fields, family.qkv_bias),
        out_bias=_bias(fields, family.out_bias),
        mlp_bias=family.mlp_bias and fields.flag("mlp_bias", False),
        head_bias=family.head_bias and fields.flag("lm_head_bias", False),
        qk_norm=family.qk_norm,
        clip_qkv=fields.real("clip_qkv") if family.clip_qkv and "clip_qkv" in fields else None,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        windows=_windows(fields, family, layers, reach),
        moe=moe,
        moe_layers=moe_layers,
        bos_id=next(iter(_token_ids(fields, "bos_token_id", family.bos, vocab)), None),
        eos_ids=_eos_ids(fields, generation_config, family, vocab),
        dtype=fields.choice(first_present(fields, ("dtype", "torch_dtype")), _DTYPES, "float32"),
    )


def _refuse_other_kinds(fields: Fields) -> None:
    """Checkpoints of a known model_type that are nonetheless something else."""
    if "quantization_config" in fields:
        fields.refuse("quantization_config", "none: unquantized checkpoints, which jaxinfer quantizes itself")
    names = fields.values.get("architectures") or []
    if not isinstance(names, list) or (names and not any(str(n).endswith("ForCausalLM") for n in names)):
        fields.refuse("architectures", "a causal language model (...ForCausalLM)")


def _kv_heads(fields: Fields, family: Family, heads: int) -> int:
    absent = "num_key_value_heads" not in fields.values
    default = family.kv_heads if absent and family.kv_heads is not None else heads
    kv_heads = fields.whole("num_key_value_heads", default)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    return kv_heads


def _head_dim(fields: Fields, family: Family, heads: int) -> int:
    if "head_dim" in fields:
        return fields.whole("head_dim")
    if family.head_dim is not None and "head_dim" not in fields.values:
        return family.head_dim
    hidden = fields.whole("hidden_size")
    if hidden % heads:
        fields.refuse("hidden_size", f"a multiple of num_attention_heads ({heads}), or head_dim beside it")
    return hidden // heads


def _bias(fields: Fields, rule: bool | str) -> bool:
    return fields.flag(rule, False) if isinstance(rule, str) else rule


def _windows(fields: Fields, family: Family, layers: int, reach: int) -> tuple[int, ...]:
    """Sliding window of each layer; 0 where it never bites."""
    used = family.window == "all" or (
        family.window.endswith("_if_used") and fields.flag("use_sliding_window", False)
    )
    null = "sliding_window" in fields.values and "sliding_window" not in fields
    if not used or null or (family.default_window is None and "sliding_window" not in fields):
        return (0,) * layers
    window = fields.whole("sliding_window", family.default_window)
    window = 0 if window >= reach else window
    if family.window != "upper_if_used":
        return (window,) * layers
    return tuple(window if slides else 0 for slides in _sliding_layers(fields, layers))


def _sliding_layers(fields: Fields, layers: int) -> list[bool]:
    if "layer_types" not in fields:
        first = fields.whole("max_window_layers", 28, low=0)
        return [layer >= first for layer in range(layers)]
    names = fields.values["layer_types"]
    known = ("full_attention", "sliding_attention")
    if not isinstance(names, (list, tuple)) or len(names) != layers or any(n not in known for n in names):
        fields.refuse("layer_types", f"a list of {layers} names, each {' or '.join(known)}")
    return [name == "sliding_attention" for name in names]


def _moe(fields: Fields, family: Family, layers: int) -> tuple[MoEConfig | None, tuple[bool, ...]]:
    if family.expert_width is None:
        return None, (False,) * layers
    experts_key = first_present(fields, ("num_local_experts", "num_experts"))
    experts = fields.whole(
        experts_key, family.experts, low=0 if family.sparse_layers else 1, high=_MOST_EXPERTS
    )
    sparse = _sparse_layers(fields, family, layers) if experts else (False,) * layers
    if not any(sparse):
        return None, sparse
    chosen = fields.whole("num_experts_per_tok", family.experts_per_token)
    if chosen > experts or (family.router == "sparsemixer" and chosen != 2):
        fields.refuse("num_experts_per_tok", "2" if family.router == "sparsemixer" else f"at most {experts}")
    key = family.renormalize
    moe = MoEConfig(
        experts=experts,
        experts_per_token=chosen,
        width=fields.whole(family.expert_width),
        renormalize=fields.flag(key, False) if isinstance(key, str) else key,
        router=family.router,
        router_jitter=fields.real("router_jitter_noise", 0.01, above=-1e-9)
        if family.router == "sparsemixer"
        else 0.0,
    )
    return moe, sparse


def _sparse_layers(fields: Fields, family: Family, layers: int) -> tuple[bool, ...]:
    if not family.sparse_layers:
        return (True,) * layers
    dense, step = fields.wholes("mlp_only_layers"), fields.whole("decoder_sparse_step", 1)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _eos_ids(
    fields: Fields, generation: Mapping[str, Any] | None, family: Family, vocab: int
) -> tuple[int, ...]:
    """End-of-sequence tokens of both files; the family's own if neither names one."""
    found = _token_ids(fields, "eos_token_id", None, vocab)
    if generation is not None:
        found += _token_ids(Fields(generation, "generation_config.json"), "eos_token_id", None, vocab)
    if not found and "eos_token_id" not in fields.values:
        found = _token_ids(fields, "eos_token_id", family.eos, vocab)
    return tuple(dict.fromkeys(found))


def _token_ids(fields: Fields, key: str, default: int | None, vocab: int) -> tuple[int, ...]:
    """Ids outside the vocabulary are dropped: some files use -1 for none, or keep the id of a larger vocabulary."""
    ids = fields.wholes(key)
    if not ids and default is not None and key not in fields.values:
        ids = (default,)
    return tuple(token for token in ids if 0 <= token < vocab)


__all__ = ["from_hugging_face", "from_json", "to_json"]
