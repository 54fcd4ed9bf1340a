"""The parameters of a decoder layer and what surrounds the layers. Modules hold arrays (plain, or packed as `QArray`)
and nothing else.

Every class takes `make` (how arrays come to be) and `lead` (leading axes: the layers of a stacked run).
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
from flax import nnx

from jaxinfer.models.config import ModelConfig

Lead = tuple[int, ...]
Matrix = Any
"""The weights of a linear layer: a jax.Array, or a `QArray` where the model is quantized; on a mesh, what stands for either in
`shares`."""


class Make(Protocol):
    """Makes parameters: random weights, or ones and zeros for norms and biases. `matrix` is the weight of a linear layer, packed
    where the model is quantized; `sorts`: it may take its inputs in an order of its own."""

    def weight(self, *shape: int) -> jax.Array: ...
    def matrix(self, lead: Lead, inputs: Lead, outputs: Lead, *, sorts: bool = True) -> Matrix: ...
    def ones(self, *shape: int) -> jax.Array: ...
    def zeros(self, *shape: int) -> jax.Array: ...


class Norm(nnx.Module):
    """scale [*shape]; bias [*shape] for layer norm, None for RMS norm."""

    scale: jax.Array
    bias: jax.Array | None

    def __init__(self, make: Make, *shape: int, bias: bool = False):
        self.scale = nnx.data(make.ones(*shape))
        self.bias = nnx.data(make.zeros(*shape) if bias else None)


class Attention(nnx.Module):
    """qkv [D, Hkv, G+2, Dh] (each KV head holds its G query heads, then k, then v, so that a shard by KV head is whole),
    qkv_bias [Hkv, G+2, Dh], out [Hq, Dh, D], out_bias [D], q_norm [Dh] or [Hq, Dh], k_norm [Dh] or [Hkv, Dh]."""

    qkv: Matrix
    qkv_bias: jax.Array | None
    out: Matrix
    out_bias: jax.Array | None
    q_norm: jax.Array | None
    k_norm: jax.Array | None

    def __init__(self, make: Make, config: ModelConfig, lead: Lead):
        wide, slots, dim = config.hidden_size, config.group + 2, config.head_dim
        self.qkv = nnx.data(make.matrix(lead, (wide,), (config.kv_heads, slots, dim)))
        self.qkv_bias = nnx.data(make.zeros(*lead, config.kv_heads, slots, dim) if config.qkv_bias else None)
        self.out = nnx.data(make.matrix(lead, (config.heads, dim), (wide,)))
        self.out_bias = nnx.data(make.zeros(*lead, wide) if config.out_bias else None)
        full = config.qk_norm == "full"
        normed = config.qk_norm != "none"
        self.q_norm = nnx.data(
            make.ones(*lead, *((config.heads, dim) if full else (dim,))) if normed else None
        )
        self.k_norm = nnx.data(
            make.ones(*lead, *((config.kv_heads, dim) if full else (dim,))) if normed else None
        )


class MLP(nnx.Module):
    """gate_up [D, 2, F], gate_up_bias [2, F], down [F, D], down_bias [D]."""

    gate_up: Matrix
    gate_up_bias: jax.Array | None
    down: Matrix
    down_bias: jax.Array | None

    def __init__(self, make: Make, config: ModelConfig, lead: Lead):
        wide, width = config.hidden_size, config.mlp_width
        self.gate_up = nnx.data(make.matrix(lead, (wide,), (2, width)))
        self.gate_up_bias = nnx.data(make.zeros(*lead, 2, width) if config.mlp_bias else None)
        self.down = nnx.data(make.matrix(lead, (width,), (wide,), sorts=False))
        self.down_bias = nnx.data(make.zeros(*lead, wide) if config.mlp_bias else None)


class MoE(nnx.Module):
    """router [D, E], gate_up [E, D, 2, F], down [E, F, D]."""

    router: jax.Array
    gate_up: Matrix
    down: Matrix

    def __init__(self, make: Make, config: ModelConfig, lead: Lead):
        assert config.moe is not None
        wide, experts, width = config.hidden_size, config.moe.experts, config.moe.width
        self.router = nnx.data(make.weight(*lead, wide, experts))
        self.gate_up = nnx.data(make.matrix((*lead, experts), (wide,), (2, width)))
        self.down = nnx.data(make.matrix((*lead, experts), (width,), (wide,), sorts=False))


class Layer(nnx.Module):
    """One decoder layer, or a stacked run of them."""

    def __init__(self, make: Make, config: ModelConfig, *, moe: bool, lead: Lead = ()):
        bias = config.norm == "layer"
        self.attn_norm = Norm(make, *lead, config.hidden_size, bias=bias)
        self.attention = Attention(make, config, lead)
        self.mlp_norm = Norm(make, *lead, config.hidden_size, bias=bias)
        self.mlp: MLP | MoE = MoE(make, config, lead) if moe else MLP(make, config, lead)


class Decoder(nnx.Module):
    """embed [V, D]; runs: one stacked Layer (or, unstacked, a list of Layers) per entry of `config.runs`; norm;
    head [D, V], None where it is tied to embed; head_bias [V]."""

    embed: jax.Array
    head: jax.Array | None
    head_bias: jax.Array | None

    def __init__(self, make: Make, config: ModelConfig):
        vocab, wide = config.vocab_size, config.hidden_size
        self.embed = nnx.data(make.weight(vocab, wide))
        self.runs: nnx.List = nnx.List(
            [Layer(make, config, moe=moe, lead=(count,)) for moe, count in config.runs]
        )
        self.norm = Norm(make, wide, bias=config.norm == "layer")
        self.head = nnx.data(None if config.tie_embeddings else make.weight(wide, vocab))
        self.head_bias = nnx.data(make.zeros(vocab) if config.head_bias else None)
