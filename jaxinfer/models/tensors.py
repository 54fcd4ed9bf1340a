"""Where the tensors of a Hugging Face checkpoint go: the packing of every family, as data.

Storage is per layer, with dotted paths: `embed`, `norm.scale`, `head`, `layers.{i}.attention.qkv`, `layers.{i}.mlp.gate_up`,
`layers.{i}.mlp.router`, `layers.{i}.moe.experts.{e}.gate_up` [D, 2, F] and `.down` [F, D].
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import jax

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import abstract
from jaxinfer.models.tensor_spec import (
    EVERY,
    EVERYTHING,
    Index,
    Shape,
    TensorSpec,
    fused_gate_up,
    matrix,
    norm,
    whole,
)


def tensor_table(config: ModelConfig, names: Container[str] | None = None) -> tuple[TensorSpec, ...]:
    """Every tensor that a checkpoint of this family holds, piece by piece; together they fill storage exactly once.

    Args:
      names: the checkpoint's tensor names. Where a family has more than one layout (experts one by one, or fused as
        transformers 5 keeps them in memory) they decide; without them, the layout of the hub.
    """
    names = () if names is None else names
    specs = [whole("model.embed_tokens.weight", "embed", "embed", (config.vocab_size, config.hidden_size))]
    specs += norm("model.norm", "norm", config)
    if not config.tie_embeddings:
        specs.append(matrix("lm_head.weight", "head", "head", config.vocab_size, config.hidden_size))
    if config.head_bias:
        specs.append(whole("lm_head.bias", "head_bias", "head_bias", (config.vocab_size,)))
    for layer, has_experts in enumerate(config.moe_layers):
        specs += _layer(layer, has_experts, config, names)
    return tuple(specs)


def ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints carry and that say nothing new: rotary tables, the head of a tied model."""
    tied_head = config.tie_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith((".rotary_emb.inv_freq", ".masked_bias", ".attn.bias"))


def storage_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every array in storage, by path: `abstract` with its runs taken apart into layers and experts."""
    model = abstract(config)
    shapes = {path: tuple(leaf.shape) for path, leaf in _leaves(model) if not path.startswith("runs.")}
    first = 0
    for run, (has_experts, count) in zip(model.runs, config.runs):
        for path, leaf in _leaves(run):
            for layer in range(first, first + count):
                if has_experts and path.startswith(("mlp.gate_up", "mlp.down")):
                    for expert in range(leaf.shape[1]):
                        name = path.removeprefix("mlp.")
                        shapes[f"layers.{layer}.moe.experts.{expert}.{name}"] = tuple(leaf.shape[2:])
                else:
                    shapes[f"layers.{layer}.{path}"] = tuple(leaf.shape[1:])
        first += count
    return shapes


def _leaves(tree) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _layer(layer: int, has_experts: bool, config: ModelConfig, names: Container[str]) -> Iterator[TensorSpec]:
    source, target = f"model.layers.{layer}", f"layers.{layer}"
    yield from norm(f"{source}.input_layernorm", f"{target}.attn_norm", config)
    yield from norm(f"{source}.post_attention_layernorm", f"{target}.mlp_norm", config)
    yield from _attention(f"{source}.self_attn", f"{target}.attention", config)
    if has_experts:
        yield from _moe(source, target, config, names)
    else:
        yield from _dense_mlp(f"{source}.mlp", f"{target}.mlp", config)


def _attention(source: str, target: str, config: ModelConfig) -> Iterator[TensorSpec]:
    wide, kv, group, dim = config.hidden_size, config.kv_heads, config.group, config.head_dim
    # part, query or KV heads, slots of each KV head, place among the slots
    parts = (
        ("q", config.heads, (kv, group, dim), slice(0, group)),
        ("k", kv, (kv, dim), group),
        ("v", kv, (kv, dim), group + 1),
    )
    fused_rows = (config.heads + 2 * kv) * dim
    row = 0
    for part, heads, split, slot in parts:
        rows = heads * dim
        fused = config.family in _FUSED
        stem = f"{source}.qkv_proj" if fused else f"{source}.{part}_proj"
        shape = fused_rows if fused else rows
        piece: Index = (slice(row, row + rows),) if fused else EVERYTHING
        last = len(split)
        yield TensorSpec(
            name=f"{stem}.weight",
            shape=(shape, wide),
            source=piece,
            split=(*split, wide),
            axes=(last, *range(last)),
            target=f"{target}.qkv",
            slot=(EVERY, EVERY, slot),
            part=part,
        )
        if config.qkv_bias:
            yield TensorSpec(
                name=f"{stem}.bias",
                shape=(shape,),
                source=piece,
                split=split,
                axes=tuple(range(last)),
                target=f"{target}.qkv_bias",
                slot=(EVERY, slot),
                part=part,
            )
        row += rows
    yield TensorSpec(
        name=f"{source}.o_proj.weight",
        shape=(wide, config.heads * dim),
        split=(wide, config.heads, dim),
        axes=(1, 2, 0),
        target=f"{target}.out",
        part="out",
    )
    if config.out_bias:
        yield whole(f"{source}.o_proj.bias", f"{target}.out_bias", "out", (wide,))
    if config.qk_norm != "none":
        for part, heads in (("q_norm", config.heads), ("k_norm", kv)):
            view = (heads, dim) if config.qk_norm == "full" else (dim,)
            yield whole(f"{source}.{part}.weight", f"{target}.{part}", part, view, flat=True)


def _dense_mlp(source: str, target: str, config: ModelConfig) -> Iterator[TensorSpec]:
    wide, width = config.hidden_size, config.mlp_width
    if config.family in _FUSED:
        yield fused_gate_up(f"{source}.gate_up_proj.weight", f"{target}.gate_up", wide, width)
    else:
        for slot, part in enumerate(("gate", "up")):
            name = f"{source}.{part}_proj"
            yield matrix(f"{name}.weight", f"{target}.gate_up", part, width, wide, slot=(EVERY, slot))
            if config.mlp_bias:
                yield whole(f"{name}.bias", f"{target}.gate_up_bias", part, (width,), slot=(slot,))
    yield matrix(f"{source}.down_proj.weight", f"{target}.down", "down", wide, width)
    if config.mlp_bias:
        yield whole(f"{source}.down_proj.bias", f"{target}.down_bias", "down", (wide,))


def _moe(source: str, target: str, config: ModelConfig, names: Container[str]) -> Iterator[TensorSpec]:
    assert config.moe is not None
    experts, wide = config.moe.experts, config.hidden_size
    layouts = _MOE_LAYOUTS[config.family]
    routers = [
        matrix(f"{source}.{layout.router}.weight", f"{target}.mlp.router", "router", experts, wide)
        for layout in layouts
    ]
    yield next((spec for spec in routers if spec.name in names), routers[0])
    candidates = [list(layout.experts(f"{source}.{layout.block}", target, config)) for layout in layouts]
    yield from next((specs for specs in candidates if specs[0].name in names), candidates[0])


def _experts_one_by_one(gate: str, up: str, down: str) -> Callable[..., Iterator[TensorSpec]]:
    def experts(source: str, target: str, config: ModelConfig) -> Iterator[TensorSpec]:
        assert config.moe is not None
        wide, width = config.hidden_size, config.moe.width
        for expert in range(config.moe.experts):
            name, place = f"{source}.{expert}", f"{target}.moe.experts.{expert}"
            for slot, (part, stem) in enumerate((("gate", gate), ("up", up))):
                yield matrix(
                    f"{name}.{stem}.weight", f"{place}.gate_up", part, width, wide, slot=(EVERY, slot)
                )
            yield matrix(f"{name}.{down}.weight", f"{place}.down", "down", wide, width)

    return experts


def _experts_fused(source: str, target: str, config: ModelConfig) -> Iterator[TensorSpec]:
    """All experts in one tensor: gate_up_proj [E, 2F, D], down_proj [E, D, F]."""
    assert config.moe is not None
    count, wide, width = config.moe.experts, config.hidden_size, config.moe.width
    for expert in range(count):
        place = f"{target}.moe.experts.{expert}"
        yield TensorSpec(
            name=f"{source}.gate_up_proj",
            shape=(count, 2 * width, wide),
            source=(expert,),
            split=(2, width, wide),
            axes=(2, 0, 1),
            target=f"{place}.gate_up",
            part="gate_up",
        )
        yield TensorSpec(
            name=f"{source}.down_proj",
            shape=(count, wide, width),
            source=(expert,),
            split=(wide, width),
            axes=(1, 0),
            target=f"{place}.down",
            part="down",
        )


@dataclass(frozen=True)
class _MoELayout:
    router: str
    block: str
    experts: Callable[..., Iterator[TensorSpec]]


_W123 = _experts_one_by_one("w1", "w3", "w2")
_NAMED = _experts_one_by_one("gate_proj", "up_proj", "down_proj")
_MIXTRAL = (
    _MoELayout("block_sparse_moe.gate", "block_sparse_moe.experts", _W123),
    _MoELayout("mlp.gate", "mlp.experts", _experts_fused),
)
_QWEN = (
    _MoELayout("mlp.gate", "mlp.experts", _NAMED),
    _MoELayout("mlp.gate", "mlp.experts", _experts_fused),
)
_PHIMOE = (_MIXTRAL[0], _MoELayout("mlp.router", "mlp.experts", _experts_fused))
_MOE_LAYOUTS = {"mixtral": _MIXTRAL, "phimoe": _PHIMOE, "qwen3_moe": _QWEN, "olmoe": _QWEN}
_FUSED = frozenset({"phi3"})  # one tensor for q, k and v, one for gate and up
