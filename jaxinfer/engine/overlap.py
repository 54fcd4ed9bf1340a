"""How each mixed step is run: in which of the ways of `Way`, by what steps were measured to take on this machine."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxinfer.engine.batch import Batch, Batcher, Rows, Tokens
from jaxinfer.engine.memory import MemoryPlan, bucket
from jaxinfer.engine.plan import StepPlan
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.nano import splits
from jaxinfer.schedule.step_times import StepShape, StepTimes, Timing, Way

logger = logging.getLogger("jaxinfer")

TILE = 128  # rows of a block of the products: nano-batches are whole ones
_CONTEXTS = (64, 2048, 8192)  # of the decoding rows of measured steps
_REPEATS = 3

Run = Callable[[Batch, StepShape], jax.Array]


class Overlap:
    """Attributes:
    times: of steps each way; None where the way does not depend on them.
    always: the way of every step that `times` says nothing of.
    """

    def __init__(self, buckets: Sequence[int], times: StepTimes | None = None, always: Way = Way.WHOLE):
        self.times, self.always = times, always
        self._buckets = tuple(buckets)

    def shape(self, plan: StepPlan) -> StepShape:
        """The program for a step."""
        every = plan.decodes + plan.prefills
        total = sum(chunk.count for chunk in every)
        tokens = bucket(total, self._buckets)
        if any(chunk.sequence.request.score for chunk in plan.prefills):
            return StepShape(Way.WHOLE, tokens)
        if self.times is None:
            return StepShape(self.always, tokens)
        single = [chunk.start + 1 for chunk in every if chunk.decodes or chunk.sparse]
        return self.times.fastest(tokens, len(single), total - len(single), sum(single))

    @property
    def shapes(self) -> Iterator[StepShape]:
        """Every program that a step may ask for."""
        yield from (StepShape(self.always, tokens) for tokens in self._buckets)
        if self.always is not Way.WHOLE:
            yield from (StepShape(Way.WHOLE, tokens) for tokens in self._buckets)  # for scores
        if self.times is not None:
            yield from sorted(self.times.shapes)


def ways(config: ModelConfig) -> tuple[Way, ...]:
    """Those that a GPU can run this model's steps in; kernels for some of them may be missing, which measuring shows."""
    if jax.default_backend() != "gpu" or any(config.windows):
        return (Way.WHOLE,)
    return tuple(Way) if splits(config) else (Way.WHOLE, Way.ATTENTION)


def pairs(memory: MemoryPlan) -> list[tuple[int, int]]:
    """Sizes of steps and of their first nano-batches that are measured. Plans fill steps up to the largest, so those from a
    quarter of it on."""
    most, largest = -(-memory.max_seqs // TILE) * TILE, memory.token_buckets[-1]
    firsts = sorted({min(TILE * 4**i, most) for i in range(8)})
    sizes = [size for size in memory.token_buckets if size in (largest, largest // 2, largest // 4)]
    return [(size, first) for size in sizes for first in firsts if size >= 2 * first]


def identity(device_kind: str, package: str, *parts: object) -> str:
    """Of what a table was measured for: another device, version, model or setting takes another time."""
    text = "\n".join(map(repr, (device_kind, package, jax.__version__, *parts)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def measure(
    run: Run, batcher: Batcher, memory: MemoryPlan, sizes: Sequence[tuple[int, int]], offered: Sequence[Way],
    lost: Callable[[], None],
) -> StepTimes:  # fmt: skip
    """Times whole steps over a pool whose contents do not matter, from the largest on: a way that gains nothing there is not tried
    in smaller ones, and one that fails is left out, and said.

    Args:
      run: a step, whose result is waited for.
      sizes: see `pairs`.
      lost: called after a failure, which may have taken the donated state with it.

    Raises:
      JaxRuntimeError: a plain step failed.
    """
    timings: list[Timing] = []
    left = list(offered)
    for tokens, group in itertools.groupby(sorted(sizes, reverse=True), key=lambda size: size[0]):
        worth = {Way.WHOLE}
        for (_, first), way in itertools.product(group, left):
            shape = StepShape(way, tokens, first if way.in_two else 0)
            try:
                timings.append(_timing(run, batcher, memory, shape, first))
            except jax.errors.JaxRuntimeError as error:
                if way is Way.WHOLE:
                    raise
                reason = str(error).splitlines()[0]
                logger.warning("engine.overlap: no %s steps of %d tokens: %s", way.value, tokens, reason)
                lost()
        found = StepTimes(tuple(timings))
        worth |= {shape.way for shape in found.shapes if shape.tokens == tokens}
        left = [way for way in left if way in worth]
    return StepTimes(tuple(timings))


def _timing(run: Run, batcher: Batcher, memory: MemoryPlan, shape: StepShape, decodes: int) -> Timing:
    contexts = sorted({min(context, memory.context) for context in _CONTEXTS})
    batches = [_batch(batcher, memory, shape.tokens, decodes, context) for context in contexts]
    seconds = [_seconds(run, batch, shape) for batch in batches]
    rows = [Rows(*batch.rows) for batch in batches]
    keys = (float(each.kv_lengths[each.single > 0].sum()) for each in rows)
    return Timing(shape.way, shape.tokens, decodes, tuple(keys), tuple(seconds))


def _seconds(run: Run, batch: Batch, shape: StepShape) -> float:
    """The fastest of several, after one to compile."""
    taken = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(batch, shape))
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _batch(batcher: Batcher, memory: MemoryPlan, size: int, decodes: int, context: int) -> Batch:
    """A step in which as many of `decodes` rows as there is room for decode, each of so many tokens, beside chunks of prompts."""
    batch = batcher.mixed(StepPlan(), size)
    rows, tokens = Rows(*batch.rows), Tokens(*batch.tokens)
    room = len(rows.slots)
    chunk = min(size, memory.context)
    decodes = min(decodes, room - -(-size // chunk))
    counts = [1] * decodes + [min(chunk, size - start) for start in range(decodes, size, chunk)]
    starts = np.cumsum(counts) - counts
    order = np.arange(memory.table_width, dtype=np.int32)
    for row, (start, count) in enumerate(zip(starts, counts)):
        length = context if row < decodes else count
        rows.slots[row], rows.starts[row], rows.counts[row], rows.kv_lengths[row] = row, start, count, length
        rows.single[row] = rows.samples[row] = row < decodes
        pages = 1 + (order + row * memory.table_width) % (memory.pages - 1)
        batch.page_table[row] = pages
        here, positions = slice(start, start + count), np.arange(length - count, length)
        tokens.slots[here], tokens.positions[here], tokens.rope_lengths[here] = row, positions, positions + 1
        own = pages[positions // memory.page_size]
        tokens.kv_slots[here] = own * memory.page_size + positions % memory.page_size
    return batch
