"""The loop: admit, plan, batch, forward and sample on the device, update."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from jaxinfer.config import Settings
from jaxinfer.core import MAX_LOGIT_BIAS, Completion, Request, Usage
from jaxinfer.engine.answers import OpenRequest
from jaxinfer.engine.batch import Batcher, Needs, needs_of
from jaxinfer.engine.memory import MAX_BANNED, MemoryPlan, bucket
from jaxinfer.engine.metrics import Metrics
from jaxinfer.engine.planner import Chunk, Planner, StepPlan, TokensNeeded
from jaxinfer.engine.sampler import Sampled
from jaxinfer.engine.sequence import Sequence
from jaxinfer.engine.step import StepSpec, decode_steps, mixed_step, score_step, set_slot
from jaxinfer.engine.stopping import TextTokenizer
from jaxinfer.errors import EngineError, RequestError
from jaxinfer.kvcache.cache import PageCache
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder
from jaxinfer.models.rotary import prefix_namespace

logger = logging.getLogger("jaxinfer")

WAITING_PER_SLOT = 4  # requests read ahead, per sequence that can run


@dataclass(frozen=True)
class InFlight:
    """A device call whose tokens the host has not read. scores: float32 [T] of a scoring step."""

    plan: StepPlan
    sampled: Sampled
    logprobs: bool
    scores: jax.Array | None = None


class Engine:
    """Continuous batching over one model. The host plans one call ahead of the one whose tokens it reads."""

    def __init__(
        self, config: ModelConfig, model: Decoder, settings: Settings, tokenizer: TextTokenizer | None = None
    ):
        self.config = config
        self.settings = settings
        self.tokenizer = tokenizer
        self.metrics = Metrics()
        self.memory = MemoryPlan.make(config, settings)
        self.planner = Planner(settings.engine, self._new_cache(), config.rope)
        self._batcher = Batcher(settings.engine.max_seqs, self.memory.table_width, settings.cache.page_size)
        self._weights, tree = jax.tree.flatten(model)
        self._spec = StepSpec(config, tree, settings.engine.decode_steps, self._count_compilation)
        self._state = self.memory.make_state()
        self._in_flight: deque[InFlight] = deque()
        self._open: dict[Sequence, OpenRequest] = {}
        self._finished: deque[Completion] = deque()

    @property
    def cache(self) -> PageCache:
        return self.planner.cache

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. `requests` is read as the engine has room, so it may be endless."""
        source, more = iter(requests), True
        window = self.settings.engine.max_seqs * WAITING_PER_SLOT
        try:
            while more or self.busy:
                while more and len(self.planner.waiting) < window:
                    request = next(source, None)
                    more = request is not None
                    if request is not None:
                        self.add(request)
                if self.busy:
                    self.step()
                while self._finished:
                    yield self._finished.popleft()
        finally:
            self.cancel()

    @property
    def busy(self) -> bool:
        return bool(self.planner.waiting or self.planner.running or self._in_flight or self._finished)

    def add(self, request: Request) -> None:
        """Queue a request. One that can never be served finishes at once, with its error."""
        try:
            limit = self._limit(request)
        except RequestError as error:
            usage = Usage(prompt_tokens=len(request.prompt_ids))
            self._finished.append(Completion(request_id=request.id, usage=usage, error=error))
            return
        opened = OpenRequest(
            request,
            limit,
            prefix_namespace(self.config.rope, len(request.prompt_ids)),
            default_seed=self.settings.engine.seed,
            eos_ids=self.config.eos_ids,
            tokenizer=self.tokenizer,
        )
        for sequence in opened.sequences:
            self._open[sequence] = opened
            self.planner.waiting.append(sequence)

    def step(self) -> None:
        """Plan and launch the next call, then read the one before it. Out of device memory, do less at once from here.

        Raises:
          EngineError: the device failed, or has no memory for a single sequence.
        """
        try:
            self._step()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise EngineError(f"the device failed: {error}") from error
            self._shrink(error)

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            plan = self.planner.plan(in_flight=bool(self._in_flight))
        except TokensNeeded:
            plan = StepPlan()
        planned = time.perf_counter()
        self.metrics.plan_seconds += planned - start
        if plan:
            self._in_flight.append(self._launch(plan))
            self.metrics.launch_seconds += time.perf_counter() - planned
        if self._in_flight and (len(self._in_flight) > 1 or not plan):
            self._collect(self._in_flight.popleft())
        self.metrics.run_seconds += time.perf_counter() - start

    def _shrink(self, error: Exception) -> None:
        """Start everything that runs again in smaller steps. What the failed call was given may be lost with it."""
        reason = str(error).splitlines()[0]
        if not self.planner.shrink():
            raise EngineError(f"the device has no memory for a step of one token: {reason}") from error
        logger.warning(
            "out of device memory; going on with %d sequences and %d tokens a step: %s",
            self.planner.max_running,
            self.planner.max_tokens,
            reason,
        )
        self._in_flight.clear()
        self.planner.start_again(self._new_cache())
        del self._state  # before its successor is allocated
        self._state = self.memory.make_state()
        self.metrics.shrinks += 1

    def cancel(self) -> None:
        """Forget everything that is queued or running; the prefix cache stays."""
        while self._in_flight:
            jax.block_until_ready(self._in_flight.popleft().sampled)
        for sequence in list(self.planner.running):
            self.planner.release(sequence)
        self.planner.waiting.clear()
        self._open.clear()
        self._finished.clear()

    def warm_up(self) -> None:
        """Compile the programs for every declared shape, so that nothing is compiled later."""
        nothing = StepPlan()
        for needs in (None, np.zeros(len(Needs._fields), bool)):
            for size in self.memory.token_buckets:
                batch = self._batcher.mixed(nothing, size)._replace(needs=needs)
                self._state, _ = mixed_step(self._spec, self._weights, self._state, batch)
            for size in self.memory.row_buckets:
                batch = self._batcher.decode(nothing, size)._replace(needs=needs)
                self._state, _ = decode_steps(self._spec, self._weights, self._state, batch, np.int32(0))
        self._set_slot(self.settings.engine.max_seqs, np.zeros(0, np.int32), {}, ())
        jax.block_until_ready(self._state)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache of all that no sequence uses."""
        self.cache.forget()

    def _new_cache(self) -> PageCache:
        cache = self.settings.cache
        return PageCache(self.memory.pages, cache.page_size, sharing=cache.prefix_sharing)

    def check_integrity(self) -> None:
        """Assert that every page of the pool is accounted for."""
        self.cache.check_integrity(sequence.pages for sequence in self.planner.running)

    def _limit(self, request: Request) -> int:
        """Most tokens of prompt and answer. Raises RequestError where the request can never be served."""
        prompt, sampling = request.prompt_ids, request.sampling
        if len(prompt) == 0:
            raise RequestError("empty_prompt", "the prompt has no tokens; at least one is needed")
        vocabulary = self.config.vocab_size
        for token in (int(prompt.min()), int(prompt.max()), *sampling.logit_bias, *sampling.stop_token_ids):
            if not 0 <= token < vocabulary:
                raise RequestError("invalid_token", f"token id {token} is not in 0..{vocabulary - 1}")
        if sampling.stop and self.tokenizer is None:
            raise RequestError("no_tokenizer", "stop strings need a tokenizer, which this model lacks")
        generated = 0 if request.score else max(sampling.max_tokens or 1, sampling.min_tokens)
        limits = {"the context": self.memory.context, "the KV pool": self.memory.pool_tokens}
        for place, limit in limits.items():
            if len(prompt) + generated > limit:
                raise RequestError(
                    "context_length_exceeded",
                    f"{len(prompt)} prompt tokens and {generated} to generate are more than the {limit} "
                    f"tokens that {place} holds",
                )
        if request.score or sampling.max_tokens is not None:
            return len(prompt) + generated
        return min(limits.values())

    def _launch(self, plan: StepPlan) -> InFlight:
        """Hand a plan to the device; returns without waiting for it."""
        for chunk in plan.prefills:
            self._upload(chunk.sequence)
        if plan.prefills:
            real = sum(chunk.count for chunk in plan.decodes + plan.prefills)
            padded = bucket(real, self.memory.token_buckets)
            batch = self._batcher.mixed(plan, padded)
        else:
            real = sum(chunk.count for chunk in plan.decodes)
            rows = bucket(len(plan.decodes), self.memory.row_buckets)
            padded = rows * plan.steps
            batch = self._batcher.decode(plan, rows)
        given = (self._spec, self._weights, self._state, batch)
        scores = None
        if not plan.prefills:
            self._state, sampled = decode_steps(*given, np.int32(plan.steps))
        elif any(chunk.sequence.request.score for chunk in plan.prefills):
            self._state, sampled, scores = score_step(*given)
        else:
            self._state, sampled = mixed_step(*given)
        sampled.tokens.copy_to_host_async()
        self._count(plan, real, padded)
        return InFlight(plan, sampled, batch.needs is not None and bool(Needs(*batch.needs).logprobs), scores)

    def _upload(self, sequence: Sequence) -> None:
        """Bring what a sequence's penalties, biases and minimum length need to its slot."""
        sampling = sequence.request.sampling
        needs = needs_of(sampling)
        if sequence.uploaded or not (needs.penalties or needs.biases):
            return
        banned = () if sampling.min_tokens == 0 else (*self.config.eos_ids, *sampling.stop_token_ids)
        self._set_slot(sequence.slot, sequence.tokens, sampling.logit_bias, banned)
        sequence.uploaded = True

    def _set_slot(self, slot: int, tokens: np.ndarray, bias, banned) -> None:
        nowhere = self.config.vocab_size
        history = np.zeros(self.memory.context, np.int32)
        history[: len(tokens)] = tokens
        bias_ids = np.full(MAX_LOGIT_BIAS, nowhere, np.int32)
        bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        bias_ids[: len(bias)] = list(bias)
        bias_values[: len(bias)] = list(bias.values())
        banned_ids = np.full(MAX_BANNED, nowhere, np.int32)
        banned_ids[: len(banned)] = banned
        table = set_slot(self._state.table, np.int32(slot), history, bias_ids, bias_values, banned_ids)
        self._state = self._state._replace(table=table)

    def _count_compilation(self) -> None:
        self.metrics.compilations += 1

    def _count(self, plan: StepPlan, real: int, padded: int) -> None:
        metrics = self.metrics
        metrics.calls += 1
        metrics.steps += plan.steps
        metrics.computed_tokens += real
        metrics.padding_tokens += padded - real
        metrics.peak_pages = max(metrics.peak_pages, self.cache.used)
        metrics.preemptions = self.planner.preemptions

    def _collect(self, call: InFlight) -> None:
        """Read a call's tokens and advance its sequences."""
        start = time.perf_counter()
        sampled = call.sampled._replace(tokens=np.asarray(call.sampled.tokens))
        if call.logprobs:
            sampled = Sampled(*map(np.asarray, sampled))
        read = time.perf_counter()
        self.metrics.wait_seconds += read - start
        scores = None if call.scores is None else np.asarray(call.scores)
        first = 0
        for row, chunk in enumerate(call.plan.decodes + call.plan.prefills):
            if chunk.sequence.request.score:
                assert scores is not None
                self._open[chunk.sequence].take_scores(chunk, scores[first : first + chunk.count])
            elif chunk.samples:
                self._take_tokens(chunk, sampled, row)
            if chunk.sequence.finished and chunk.sequence in self._open:
                self._finish(chunk.sequence)
            first += chunk.count
        self.metrics.update_seconds += time.perf_counter() - read

    def _take_tokens(self, chunk: Chunk, sampled: Sampled, row: int) -> None:
        sequence = chunk.sequence
        for step in range(chunk.count if chunk.decodes else 1):
            if sequence.finished:
                break  # it ended before this token, which was sampled in vain
            try:
                self._open[sequence].accept(sequence, sampled, (step, row))
            except Exception as error:  # whatever it is, it concerns this request alone
                logger.exception("request %s failed", sequence.request.id)
                sequence.error = RequestError("engine_failure", f"{type(error).__name__}: {error}")
            self.metrics.generated_tokens += 1

    def _finish(self, sequence: Sequence) -> None:
        opened = self._open.pop(sequence)
        self.planner.release(sequence)
        self.metrics.prompt_tokens += sequence.prompt_length
        self.metrics.cached_tokens += sequence.cached_tokens or 0
        if opened.done:
            self._finished.append(opened.completion())
