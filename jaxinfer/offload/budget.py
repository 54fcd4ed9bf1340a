"""How many experts a device of a given memory holds beside everything else: planned from shapes, nothing is allocated."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import abstract
from jaxinfer.models.layers import MoE
from pallas_kernels.packed_experts import Record

_PAPER_SHARE = 0.95


def moe_layers(config: ModelConfig) -> int:
    """Layers that have experts."""
    return sum(config.moe_layers)


def shared_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters but the experts: attention, routers, norms, embeddings, head."""
    model = abstract(config, dtype)
    experts = sum(
        leaf.size
        for run in model.runs
        if isinstance(run.mlp, MoE)
        for leaf in (run.mlp.gate_up, run.mlp.down)
    )
    return (sum(leaf.size for leaf in jax.tree.leaves(model)) - experts) * jnp.dtype(dtype).itemsize


def activation_bytes(config: ModelConfig, tokens: int, rows: int, dtype: str) -> int:
    """Bytes of what a step of `tokens` tokens, `rows` of which meet the vocabulary, holds at once beside weights and keys.

    The widest moment of a layer: the hidden states before and after, queries, keys and values, and the experts' work for
    every (token, expert) pair: input, gate and up, output, each kept as float32. Then the logits and what sampling sorts.
    """
    assert config.moe is not None
    size = jnp.dtype(dtype).itemsize
    wide, pairs = config.hidden_size, tokens * config.moe.experts_per_token
    attention = tokens * config.head_dim * (2 * config.heads + 2 * config.kv_heads) * size
    experts = 4 * pairs * (2 * wide + 2 * config.moe.width)
    dense = 4 * tokens * 3 * config.mlp_width
    vocabulary = 4 * 3 * rows * config.vocab_size
    return 4 * tokens * wide * size + max(attention, experts, dense) + vocabulary


def expert_bytes(config: ModelConfig, format: str) -> int:
    """Bytes of one expert in a format of `packed_experts`."""
    assert config.moe is not None
    return Record(config.hidden_size, config.moe.width, format).nbytes


def expert_slots(config: ModelConfig, format: str, left: int) -> int:
    """Slots that fit into `left` bytes; no more than there are experts."""
    assert config.moe is not None
    return max(0, min(left // expert_bytes(config, format), moe_layers(config) * config.moe.experts))


def paper_slots(config: ModelConfig, device_bytes: int) -> int:
    """Experts that Fiddler's own rule puts on a device: floor((0.95 * memory - allocated) / bytes of an expert), 16-bit.

    Allocated is, when its code counts: everything but the experts, the one landing slot, and the rotary tables that its
    version of transformers kept in every layer, cos and sin of the whole context in float32. The last is inferred: with
    it the rule gives both published counts of Mixtral-8x7B, 56 of 24,576 MiB and 125 of 49,140 MiB.
    """
    expert = expert_bytes(config, "bfloat16")
    tables = 2 * 4 * config.layers * config.context_length * config.head_dim
    allocated = shared_bytes(config, "bfloat16") + expert + tables
    free = math.floor(_PAPER_SHARE * device_bytes) - allocated
    return expert_slots(config, "bfloat16", free)
