"""Everything that is on the device, and the calls that change it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from jaxinfer.attention.quest import QuestPolicy
from jaxinfer.config import Settings
from jaxinfer.core import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS
from jaxinfer.engine.batch import Batch, Batcher, Needs, needs_of
from jaxinfer.engine.memory import MemoryPlan, bucket
from jaxinfer.engine.overlap import Overlap, identity, measure, pairs, ways
from jaxinfer.engine.plan import StepPlan
from jaxinfer.engine.sampler import Sampled
from jaxinfer.engine.sequence import Sequence
from jaxinfer.engine.spread import ONE_DEVICE, Spread
from jaxinfer.engine.step import Programs, State, StepSpec, copy_pages, set_beams, set_slot
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder
from jaxinfer.offload.offload import Offload
from jaxinfer.schedule.kept import kept
from jaxinfer.schedule.step_times import StepShape, StepTimes, Way
from jaxinfer.version import package_version

logger = logging.getLogger("jaxinfer")


@dataclass(frozen=True)
class InFlight:
    """A call whose results the host has not read.

    Attributes:
      logprobs: whether a row asked for them.
      scores: float32 [T], log-probability of each token's target, of a scoring step.
      real, padded: tokens that go through the model, without and with padding.
    """

    plan: StepPlan
    sampled: Sampled
    logprobs: bool
    scores: jax.Array | None
    real: int
    padded: int

    def read(self) -> tuple[Sampled, np.ndarray | None]:
        """Waits for the call; arrays of numpy."""
        if self.logprobs:
            sampled = Sampled(*map(np.asarray, self.sampled))
        else:
            sampled = self.sampled._replace(tokens=np.asarray(self.sampled.tokens))
        return sampled, None if self.scores is None else np.asarray(self.scores)


class Device:
    """Weights, KV pool and slots, and the jitted programs over them. No call waits for the device."""

    def __init__(
        self,
        config: ModelConfig,
        model: Decoder,
        settings: Settings,
        memory: MemoryPlan,
        quest: QuestPolicy | None,
        offload: Offload | None = None,
        spread: Spread = ONE_DEVICE,
    ):
        self.memory = memory
        self._spread = spread
        self._config = config
        self.offload = offload
        self._weights, tree = jax.tree.flatten((model, None if offload is None else offload.records))
        spec = StepSpec(
            memory.local,
            tree,
            settings.engine.decode_steps,
            quest,
            offload,
            spread,
            spread.layout(self._weights),
        )
        self._programs = Programs.of(spec)
        self._compiled_before = self._programs.compilations  # by other engines of the same spec
        self._batcher = Batcher(memory.max_seqs, memory.table_width, memory.page_size)
        # Of the decode calls' loops, (): any. A GPU's host waits for every round of a loop whose length it has to learn.
        self._lengths = (1, spec.decode_steps) if jax.default_backend() == "gpu" else ()
        self._state = self._new_state()
        self.overlap = self._choose_overlap(settings.engine.overlap)

    def _choose_overlap(self, setting: str) -> Overlap:
        memory = self.memory
        if setting != "auto":
            return Overlap(memory.token_buckets, always=Way.ATTENTION if setting == "on" else Way.WHOLE)
        offered, sizes = ways(self._config), pairs(memory)
        if len(offered) == 1 or not sizes or self._spread is not ONE_DEVICE:
            return Overlap(memory.token_buckets)
        kind = jax.devices()[0].device_kind
        name = identity(kind, package_version(), memory, sizes, offered)
        given = (self._run_mixed, self._batcher, memory, sizes, offered, self.reset)

        def make() -> StepTimes:
            logger.info("measuring on this %s how mixed steps run fastest, once for this model", kind)
            return measure(*given)

        times = kept(f"steps-{name}", make, write=StepTimes.rows, read=StepTimes.of)
        self.reset()
        return Overlap(memory.token_buckets, times)

    @property
    def compilations(self) -> int:
        return self._programs.compilations - self._compiled_before

    def launch(self, plan: StepPlan) -> InFlight:
        """Start a call. The planned sequences' pages and slots are as they will be when it runs."""
        for chunk in plan.prefills:
            self._upload(chunk.sequence)
        self._branch(plan)
        scores, top = None, _top(plan)
        if not plan.prefills:
            rows = bucket(len(plan.decodes), self.memory.row_buckets)
            steps = bucket(plan.steps, self._lengths) if self._lengths else plan.steps
            real, padded = sum(chunk.count for chunk in plan.decodes), rows * steps
            batch = self._batcher.decode(plan, rows)
            sampled = self._decode(batch, steps, top)
        else:
            real = sum(chunk.count for chunk in plan.decodes + plan.prefills)
            shape = self.overlap.shape(plan)
            padded = shape.tokens
            batch = self._batcher.mixed(plan, padded, singles_first=shape.way.in_two)
            if any(chunk.sequence.request.score for chunk in plan.prefills):
                given = (self._weights, self._state, batch)
                self._state, sampled, scores = self._programs.score(*given, top=top)
            else:
                sampled = self._mixed(batch, shape, top)
        logprobs = batch.needs is not None and bool(Needs(*batch.needs).logprobs)
        for array in sampled if logprobs else [sampled.tokens]:
            array.copy_to_host_async()
        return InFlight(plan, sampled, logprobs, scores, real, padded)

    def warm_up(self) -> None:
        """Compile the programs that generate, for every declared shape; those of beam search come when they are first needed."""
        nothing, nowhere = StepPlan(), self.memory.max_seqs
        for needs in (None, np.zeros(len(Needs._fields), bool)):
            for shape in self.overlap.shapes:
                batch = self._batcher.mixed(nothing, shape.tokens)._replace(needs=needs)
                self._mixed(batch, shape, MAX_TOP_LOGPROBS)
            for size in self.memory.row_buckets:
                batch = self._batcher.decode(nothing, size)._replace(needs=needs)
                for steps in self._lengths or (0,):
                    self._decode(batch, steps, MAX_TOP_LOGPROBS)
        self._set_slot(nowhere, np.zeros(0, np.int32), {}, ())
        jax.block_until_ready(self._state)

    def wait(self) -> None:
        """Until nothing runs, whether it failed or not."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready(self._state)

    def reset(self) -> None:
        """Lose all keys and slots: a failed call may have taken its donated state with it."""
        del self._state  # before its successor is allocated
        self._state = self._new_state()

    def _mixed(self, batch: Batch, shape: StepShape, top: int) -> Sampled:
        run = self._programs.chains if shape.way is Way.CHAINS else self._programs.mixed
        self._state, sampled = run(self._weights, self._state, batch, top=top, shape=shape)
        return sampled

    def _run_mixed(self, batch: Batch, shape: StepShape) -> jax.Array:
        return self._mixed(batch, shape, MAX_TOP_LOGPROBS).tokens

    def _decode(self, batch: Batch, steps: int, top: int) -> Sampled:
        given = (self._weights, self._state, batch)
        if self._lengths:
            self._state, sampled = self._programs.decode(*given, steps=steps, top=top)
        else:
            self._state, sampled = self._programs.decode(*given, np.int32(steps), top=top)
        return sampled

    def _new_state(self) -> State:
        state = self._spread.new_state(self.memory.make_state)
        return state if self.offload is None else state._replace(slots=self.offload.move_in())

    def _branch(self, plan: StepPlan) -> None:
        """Give the beams of a plan pages of their own where they need them, and the tokens that were chosen for them."""
        state = self._state
        if plan.copies:
            pages = _padded(plan.copies, self.memory.row_buckets, self.memory.pages)
            self._state = state = state._replace(pool=copy_pages(state.pool, pages))
        if beams := plan.beams:
            rows = [(beam.forked_from, beam.slot, int(beam.tokens[-1])) for beam in beams]
            changed = _padded(rows, self.memory.row_buckets, self.memory.max_seqs + 1)
            table, chosen = set_beams((state.table, state.chosen), changed)
            self._state = state._replace(table=table, chosen=chosen)

    def _upload(self, sequence: Sequence) -> None:
        """Bring what a sequence's penalties, biases and minimum length need to its slot."""
        sampling = sequence.request.sampling
        needs = needs_of(sampling)
        if sequence.uploaded or not (needs.penalties or needs.biases):
            return
        banned = () if sampling.min_tokens == 0 else (*self._config.eos_ids, *sampling.stop_token_ids)
        self._set_slot(sequence.slot, sequence.tokens, sampling.logit_bias, banned)
        sequence.uploaded = True

    def _set_slot(
        self, slot: int, tokens: np.ndarray, bias: Mapping[int, float], banned: tuple[int, ...]
    ) -> None:
        nowhere = self._config.vocab_size
        history = np.zeros(self.memory.context, np.int32)
        history[: len(tokens)] = tokens
        bias_ids = np.full(MAX_LOGIT_BIAS, nowhere, np.int32)
        bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        bias_ids[: len(bias)] = list(bias)
        bias_values[: len(bias)] = list(bias.values())
        banned_ids = np.full(self.memory.banned_width, nowhere, np.int32)
        banned_ids[: len(banned)] = banned
        table = set_slot(self._state.table, np.int32(slot), history, bias_ids, bias_values, banned_ids)
        self._state = self._state._replace(table=table)


def _top(plan: StepPlan) -> int:
    """How many of the likeliest tokens the plan's rows need: 20, which any may ask for, or twice that until beams have enough."""
    top = MAX_TOP_LOGPROBS
    while top < plan.candidates:
        top *= 2
    return top


def _padded(rows: Iterable[tuple[int, ...]], sizes: tuple[int, ...], nowhere: int) -> np.ndarray:
    """Rows as the columns of an int32 matrix of a declared size; padding is `nowhere`."""
    columns = np.array(list(rows), np.int32).T
    missing = bucket(columns.shape[1], sizes) - columns.shape[1]
    return np.pad(columns, ((0, 0), (0, missing)), constant_values=nowhere)
