"""What the engine keeps on the device, and the shapes it may run: decided once, before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxinfer.attention import QuestPolicy, remember
from jaxinfer.config import Settings
from jaxinfer.core import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from jaxinfer.engine.sampler import SlotTable
from jaxinfer.engine.spread import ONE_DEVICE, Spread
from jaxinfer.engine.step import State
from jaxinfer.errors import ConfigError
from jaxinfer.fields import parse_memory
from jaxinfer.kvcache.pool import PACKED_BITS, make_pool, page_bytes
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import abstract
from jaxinfer.offload.budget import ExpertBudget
from jaxinfer.offload.records import expert_record
from jaxinfer.schedule.demand import DemandModel

_SMALLEST_STEP = 16
_CPU_POOL_SHARE = 0.2  # of the host's available memory; it is shared with everything else there
_DEVICE_POOL_SHARE = 0.9  # of what the weights leave; the rest is for activations


@dataclass(frozen=True)
class MemoryPlan:
    """Attributes:
    model, local: as a whole, and as one device sees it: the same but for the heads that others have.
    context: most tokens of a sequence.
    pages: pages of the pool, padding page included.
    table_width: entries of a page table (P).
    token_buckets: sizes a mixed step is padded to (T).
    row_buckets: sizes a decode call is padded to (S).
    kv_dtype: type of the pool's keys and values; "int8" and "int4" are packed.
    weight_bytes: of the model's arrays on one device, packed ones as they are.
    bounds: type of the bounds of every page's keys; None where nothing chooses pages.
    quest: how pages are chosen; None where nothing does.
    expert_slots: experts that the device holds at a time, those that are streamed included; None for all, as part of the
      model.
    """

    model: ModelConfig
    local: ModelConfig
    page_size: int
    max_seqs: int
    dtype: str
    kv_dtype: str
    context: int
    pages: int
    table_width: int
    token_buckets: tuple[int, ...]
    row_buckets: tuple[int, ...]
    weight_bytes: int
    bounds: str | None
    quest: QuestPolicy | None = None
    expert_slots: int | None = None

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        settings: Settings,
        quest: QuestPolicy | None = None,
        spread: Spread = ONE_DEVICE,
    ) -> MemoryPlan:
        """For one device, or each of those that the model is spread over.

        Raises ConfigError where the settings leave no room for a single page or contradict the model.
        """
        engine, size = settings.engine, settings.cache.page_size
        if engine.max_context is not None and engine.max_context > config.context_length:
            raise ConfigError(
                f"engine.max_context = {engine.max_context}: the model's context is {config.context_length} tokens"
            )
        context = engine.max_context or config.context_length
        dtype = config.dtype if settings.model.dtype == "auto" else settings.model.dtype
        kv_dtype = _kv_dtype(config, settings.cache.dtype, dtype)
        width = -(-context // size)
        bounds = None
        if quest is not None:
            # packed keys are bounded as what they stand for
            bounds = quest.bounds_type("float32" if kv_dtype in PACKED_BITS else kv_dtype)
        plan = cls(
            model=config,
            local=spread.local(config),
            page_size=size,
            max_seqs=engine.max_seqs,
            dtype=dtype,
            kv_dtype=kv_dtype,
            context=context,
            pages=1,
            table_width=width,
            token_buckets=_buckets(_SMALLEST_STEP, max(engine.max_tokens_per_step, engine.max_seqs), 2),
            row_buckets=_buckets(1, engine.max_seqs, 4),  # decode runs long at each size, prefill does not
            weight_bytes=weight_bytes(config, dtype, spread),
            bounds=bounds,
            quest=quest,
        )
        each, free = page_bytes(plan.local, size, kv_dtype, bounds), _free_bytes(spread.devices)
        if settings.offload.device_memory is None:
            return replace(plan, pages=_pages(settings, each, width, free))
        state = sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(plan.make_state))
        )
        largest = (plan.token_buckets[-1], plan.max_seqs)
        budget = ExpertBudget.make(config, settings.offload, dtype, free, largest, state)
        pages = _pages(settings, each, width, budget.left)
        return replace(plan, pages=pages, expert_slots=budget.slots(pages * each))

    @property
    def pool_tokens(self) -> int:
        return (self.pages - 1) * self.page_size

    def demand(self, settings: Settings) -> DemandModel:
        """What calls ask of the machine, as this model is stored and served."""
        offloaded = self.expert_slots is not None
        return DemandModel(
            self.model,
            self.dtype,
            kv_dtype=self.kv_dtype,
            quest=self.quest,
            expert_slots=self.expert_slots,
            expert_bytes=expert_record(self.model, settings.offload, self.dtype).nbytes
            if offloaded
            else None,
        )

    @property
    def banned_width(self) -> int:
        """Most tokens that can end an answer: a request's stop tokens and the model's own."""
        return MAX_STOP_TOKEN_IDS + len(self.model.eos_ids)

    def make_state(self) -> State:
        """What one device keeps."""
        slots, vocabulary = self.max_seqs + 1, self.model.vocab_size
        table = SlotTable(
            last_tokens=jnp.zeros(slots, jnp.int32),
            history=jnp.zeros((slots, self.context), jnp.int32),
            bias_ids=jnp.full((slots, MAX_LOGIT_BIAS), vocabulary, jnp.int32),
            bias_values=jnp.zeros((slots, MAX_LOGIT_BIAS)),
            banned_ids=jnp.full((slots, self.banned_width), vocabulary, jnp.int32),
        )
        pool = make_pool(self.local, self.pages, self.page_size, self.kv_dtype, self.bounds)
        if self.quest is None:
            return State(pool, table)
        heads = self.quest.choosers(self.local.heads, self.local.kv_heads)
        return State(pool, table, remember(self.quest, (self.model.layers, slots, heads), self.table_width))


def _kv_dtype(config: ModelConfig, wanted: str, computed: str) -> str:
    if wanted == "int4" and config.head_dim % 2:
        raise ConfigError(
            f'cache.dtype = "int4": the model\'s heads have {config.head_dim} channels, an odd number; '
            'expected "auto", "bfloat16", "float32" or "int8"'
        )
    return computed if wanted == "auto" else wanted


def weight_bytes(config: ModelConfig, dtype: str, spread: Spread = ONE_DEVICE) -> int:
    """What the model's arrays take of a device: packed ones as they are, everything else in `dtype`."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config, dtype)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        total += math.prod(spread.share(name, leaf.shape)) * leaf.dtype.itemsize
    return total


def _buckets(smallest: int, largest: int, parts: int) -> tuple[int, ...]:
    """Powers of two and, from 8 on, what divides the way to the next into `parts`; `largest` is the last."""
    sizes: set[int] = set()
    size = smallest
    while size < largest:
        sizes.update(range(size, min(2 * size, largest), size // parts if size >= 8 else size))
        size *= 2
    return (*sorted(sizes), largest)


def bucket(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the ascending `sizes` that holds `count`."""
    return next(size for size in sizes if size >= count)


def _pages(settings: Settings, each: int, width: int, free: int) -> int:
    """Pages of `each` bytes for `free` bytes; no more than twice what `max_seqs` page tables of `width` hold."""
    cache = settings.cache
    if cache.pages is not None:
        if cache.pages * each > free:
            raise ConfigError(
                f"cache.pages = {cache.pages}: {cache.pages * each} bytes, and {free} are free; "
                f"at most {free // each} pages fit"
            )
        return cache.pages
    memory = parse_memory(cache.memory) if cache.memory is not None else _default_share()
    most = int(memory * free if memory <= 1 else memory) // each
    if most < 2:
        raise ConfigError(
            f"cache.memory = {cache.memory!r} holds {most} pages of {each} bytes; at least 2 are needed"
        )
    # Twice what can run at once: the other half keeps shared prefixes for those that come later.
    return min(most, 2 * settings.engine.max_seqs * width + 1)


def _default_share() -> float:
    return _CPU_POOL_SHARE if jax.default_backend() == "cpu" else _DEVICE_POOL_SHARE


def _free_bytes(devices: Sequence[jax.Device]) -> int:
    """Of each of the devices; those of a CPU share what the machine has."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in each for each in stats):
        return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return _available_bytes() // len(devices)


def _available_bytes() -> int:
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
