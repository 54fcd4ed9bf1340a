"""How many experts a device of a given memory holds beside everything else: planned from shapes, nothing is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.config import OffloadSettings
from jaxinfer.errors import ConfigError
from jaxinfer.fields import parse_memory
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import abstract, without_experts
from jaxinfer.offload.records import expert_record
from pallas_kernels.packed_experts import Record

_PAPER_SHARE = 0.95
_IN_FLIGHT = (
    3  # experts beside the slots while some are streamed: one in use, one on its way, one that XLA copies
)


def moe_layers(config: ModelConfig) -> int:
    """Layers that have experts."""
    return sum(config.moe_layers)


def shared_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters but the experts: attention, routers, norms, embeddings, head."""
    leaves = jax.tree.leaves(without_experts(abstract(config, dtype)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


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


def expert_slots(config: ModelConfig, expert: int, left: int) -> int:
    """Slots that fit into `left` bytes, an expert having so many; no more than there are experts."""
    assert config.moe is not None
    return max(0, min(left // expert, moe_layers(config) * config.moe.experts))


@dataclass(frozen=True)
class ExpertBudget:
    """A device's memory, shared out: everything that has to be there first, then keys and values, then experts.

    Attributes:
      total: bytes that the model may take.
      shared: parameters but the experts; activations: what the largest step holds; state: the sequences'.
      expert: bytes of one expert; some beside those in slots are there while experts are streamed.
    """

    config: ModelConfig
    settings: OffloadSettings
    total: int
    shared: int
    activations: int
    state: int
    expert: int

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        settings: OffloadSettings,
        dtype: str,
        free: int,
        step: tuple[int, int],
        state: int,
    ) -> ExpertBudget:
        """Args:
          free: bytes that the device has; `settings.device_memory` may be a share of them.
          step: most tokens of a step, and most that meet the vocabulary.
          state: bytes that the sequences have beside their keys and values.

        Raises:
          ConfigError: a model without experts, or no room for all that is not experts and one of them.
        """
        memory = settings.device_memory
        assert memory is not None
        if config.moe is None or not any(config.moe_layers):
            raise ConfigError(
                f"offload.device_memory = {memory!r}: this model ({config.family}) has no experts to leave on the host; "
                "leave offload.device_memory away"
            )
        parsed = parse_memory(memory)
        expert = expert_record(config, settings, dtype).nbytes
        budget = cls(
            config=config,
            settings=settings,
            total=int(parsed * free) if isinstance(parsed, float) else parsed,
            shared=shared_bytes(config, dtype),
            activations=activation_bytes(config, *step, dtype),
            state=state,
            expert=expert,
        )
        if budget.left < expert:
            raise ConfigError(
                f"offload.device_memory = {memory!r}: {budget.total} bytes hold no expert beside the rest: "
                f"{budget.shared} bytes of other parameters, {budget.activations} of activations, {state} of the "
                f"sequences' state, and {expert} for each of {_IN_FLIGHT + 1} experts; at least {budget.total - budget.left + expert} and the KV "
                "pool are needed, less with a smaller engine.max_tokens_per_step or engine.max_seqs"
            )
        return budget

    @property
    def left(self) -> int:
        """Bytes for keys and values, and slots."""
        return self.total - self.shared - self.activations - self.state - _IN_FLIGHT * self.expert

    def slots(self, kv_bytes: int) -> int:
        """Slots for experts beside `kv_bytes` of keys and values.

        Raises:
          ConfigError: not one.
        """
        if self.settings.rule == "paper":
            slots = paper_slots(self.config, self.total) + 1
        else:
            slots = expert_slots(self.config, self.expert, self.left - kv_bytes)
        if slots < 1:
            raise ConfigError(
                f"offload.device_memory = {self.settings.device_memory!r}: the KV pool takes {kv_bytes} of the "
                f"{self.left} bytes that are left, and an expert needs {self.expert}; give the pool less (cache.pages, "
                "cache.memory) or the model more"
            )
        return slots


def paper_slots(config: ModelConfig, device_bytes: int) -> int:
    """Experts that Fiddler's own rule puts on a device: floor((0.95 * memory - allocated) / bytes of an expert), 16-bit.

    Allocated is, when its code counts: everything but the experts, the one landing slot, and the rotary tables that its
    version of transformers kept in every layer, cos and sin of the whole context in float32. The last is inferred: with
    it the rule gives both published counts of Mixtral-8x7B, 56 of 24,576 MiB and 125 of 49,140 MiB.
    """
    assert config.moe is not None
    expert = Record(config.hidden_size, config.moe.width, "bfloat16").nbytes
    tables = 2 * 4 * config.layers * config.context_length * config.head_dim
    allocated = shared_bytes(config, "bfloat16") + expert + tables
    free = math.floor(_PAPER_SHARE * device_bytes) - allocated
    return expert_slots(config, expert, free)
