"""The loop: admit, plan, batch, forward and sample on the device, update."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from jaxinfer.attention.policy import quest_policy
from jaxinfer.config import Settings
from jaxinfer.core import Completion, Request, Usage
from jaxinfer.engine.admission import Admission, LongestPrefix
from jaxinfer.engine.answers import OpenRequest
from jaxinfer.engine.apart import Apart
from jaxinfer.engine.beams import Beams, OpenBeams
from jaxinfer.engine.blend import Blend
from jaxinfer.engine.device import Device, InFlight
from jaxinfer.engine.limits import RequestLimits
from jaxinfer.engine.memory import MemoryPlan
from jaxinfer.engine.metrics import Metrics
from jaxinfer.engine.plan import Chunk, StepPlan, TokensNeeded
from jaxinfer.engine.planner import Planner
from jaxinfer.engine.sampler import Sampled
from jaxinfer.engine.sequence import Sequence
from jaxinfer.engine.spread import ONE_DEVICE, Spread
from jaxinfer.engine.stopping import TextTokenizer
from jaxinfer.errors import ENGINE_FAILURE, ConfigError, EngineError, RequestError
from jaxinfer.kvcache.cache import PageCache
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder
from jaxinfer.models.rotary import prefix_namespace
from jaxinfer.offload.host_experts import ExpertError
from jaxinfer.offload.offload import Offload
from jaxinfer.offload.store import ExpertStore
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.demand import Demand
from jaxinfer.schedule.lengths import expect
from jaxinfer.schedule.plan import make_plan
from jaxinfer.schedule.profile import measured
from jaxinfer.schedule.tree import RequestTree
from jaxinfer.schedule.workload import Sharing, Workload

logger = logging.getLogger("jaxinfer")

WAITING_PER_SLOT = 4  # requests read ahead, per sequence that can run
_QUANTUM = 128  # a tile of the GPU's matrix products: planned steps are filled up to whole ones


class Engine:
    """Continuous batching over one model. The host plans one call ahead of the one whose tokens it reads."""

    def __init__(
        self,
        config: ModelConfig,
        model: Decoder,
        settings: Settings,
        tokenizer: TextTokenizer | None = None,
        experts: ExpertStore | None = None,
        spread: Spread = ONE_DEVICE,
    ):
        """experts: those that `model` lacks, where `settings.offload` is on; spread: how `model` lies on several devices."""
        self.config = config
        self.settings = settings
        self.tokenizer = tokenizer
        self.quest = quest_policy(settings, config.context_length)
        if settings.engine.mesh is not None and spread is ONE_DEVICE:
            raise ConfigError("engine.mesh: the model that this engine was given lies on one device")
        self.memory = MemoryPlan.make(config, settings, self.quest, spread)
        self.limits = RequestLimits(
            config=config,
            memory=self.memory,
            has_tokenizer=tokenizer is not None,
            prompt_tail=settings.sparsity.prompt_tail,
        )
        self.planner = Planner(settings.engine, self._new_cache(), config.rope)
        if settings.schedule.policy == "longest-prefix":
            self.planner.waiting = LongestPrefix(lambda: self.planner.cache)
        self.metrics = Metrics(pages=self.cache.capacity)
        self.offload = None
        if self.memory.expert_slots is not None:
            if experts is None:
                raise ConfigError(
                    "offload.device_memory: an engine whose experts are on the host needs their store"
                )
            self.offload = Offload(experts, model, config, settings.offload, self.memory.expert_slots)
        self.device = Device(config, model, settings, self.memory, self.quest, self.offload, spread)
        self.demand = self.memory.demand(settings)
        self._in_flight: deque[InFlight] = deque()
        self._open: dict[Sequence | Beams, OpenRequest | OpenBeams] = {}
        self._finished: deque[Completion] = deque()
        self._running = False

    @property
    def cache(self) -> PageCache:
        return self.planner.cache

    def run(self, requests: Iterable[Request], admission: Admission | None = None) -> Iterator[Completion]:
        """Completions as they finish. `requests` is read as the engine has room, so it may be endless.

        Args:
          admission: decides who starts instead of the policy of the settings, in this call.

        Raises:
          EngineError: the engine is answering another call, or the device failed.
        """
        if self._running:
            raise EngineError("the engine is answering another call: finish or close its iterator first")
        source, more = iter(requests), True
        window = self.settings.engine.max_seqs * WAITING_PER_SLOT
        self._running = True
        usual = self.planner.waiting
        self.planner.waiting = usual if admission is None else admission
        try:
            while more or self.busy:
                while more and not self._finished and self.planner.waiting.hungry(window):
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
            self.planner.waiting = usual
            self._running = False

    @functools.cached_property
    def cost(self) -> Cost:
        """Of this model's work on this machine: by the machine's profile, and by the times of steps where they were measured."""
        cost, times = Cost.of(self.demand, measured(self.memory.dtype)), self.device.overlap.times
        return cost if times is None else dataclasses.replace(cost, joint=times.joint)

    def blend(self, workload: Workload, sharing: Sharing) -> Blend | Apart:
        """The admission of policy "blend" for a whole batch, planned for this model on this machine."""
        size = self.settings.cache.page_size
        engine = self.settings.engine
        tree = RequestTree.shared(workload, sharing, size)
        cost = self.cost
        if not cost.joint.overlaps:
            known = workload.known
            seen = np.flatnonzero(known >= 0)
            lengths = expect(tree, workload.least, workload.answer_limits, seen, known[seen]).length
            return Apart(make_plan(tree, cost, lengths).only(known < 0), sharing, lengths)
        return Blend(
            workload,
            tree,
            cost,
            capacity=self.memory.pool_tokens,
            slots=engine.max_seqs,
            max_tokens=engine.max_tokens_per_step,
            quantum=self.quantum,
            seed=engine.seed,
        )

    @property
    def quantum(self) -> int:
        """Tokens to whose multiples a steered step is filled up."""
        return min(_QUANTUM, max(self.settings.engine.max_tokens_per_step // 16, 1))

    @property
    def busy(self) -> bool:
        planner = self.planner
        return bool(len(planner.waiting) or planner.running or self._in_flight or self._finished)

    def add(self, request: Request) -> None:
        """Queue a request. One that can never be served finishes at once, with its error."""
        try:
            limit = self.token_limit(request)
        except RequestError as error:
            usage = Usage(prompt_tokens=len(request.prompt_ids))
            self._finished.append(Completion(request_id=request.id, usage=usage, error=error))
            return
        opened = self._opened(request, limit)
        for sequence in opened.sequences:
            self._open[sequence.job] = opened
            self.planner.waiting.add(sequence)

    def _opened(self, request: Request, limit: int) -> OpenRequest | OpenBeams:
        given = (request, limit, prefix_namespace(self.config.rope, len(request.prompt_ids)))
        eos, dense = self.config.eos_ids, self.limits.dense_tokens(request)
        if request.sampling.beam_width > 1 and not request.score:
            return OpenBeams(*given, eos_ids=eos, tokenizer=self.tokenizer, dense_tokens=dense)
        seed = self.settings.engine.seed
        return OpenRequest(
            *given, default_seed=seed, eos_ids=eos, tokenizer=self.tokenizer, dense_tokens=dense
        )

    def token_limit(self, request: Request) -> int:
        """Most tokens of its prompt and one answer. Raises RequestError if it can never be served."""
        return self.limits.token_limit(request)

    def step(self) -> None:
        """Plan and launch the next call, then read the one before it. Out of device memory, do less at once from here.

        Raises:
          EngineError: the device failed, or has no memory for a single sequence.
        """
        try:
            self._step()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                self._shrink(error)
            else:
                self._start_over()
                raise EngineError(f"the device failed: {error}") from error
        except BaseException:
            # Pages count as computed once their step is planned; after an interrupt nobody knows which were.
            self._start_over()
            raise

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            plan = self.planner.plan(in_flight=bool(self._in_flight))
        except TokensNeeded:
            plan = StepPlan()
        planned = time.perf_counter()
        self.metrics.plan_seconds += planned - start
        if plan:
            self._in_flight.append(self.device.launch(plan))
            self._count(self._in_flight[-1])
            self.metrics.launch_seconds += time.perf_counter() - planned
        if self._in_flight and (len(self._in_flight) > 1 or not plan):
            self._collect(self._in_flight.popleft())
        elif not plan and self.planner.running:
            raise EngineError(
                f"{len(self.planner.running)} sequences run and none can go on; this is a fault of ours"
            )
        self.metrics.run_seconds += time.perf_counter() - start

    def _fail_running(self, failure: ExpertError) -> None:
        """The experts on the host failed: what runs has wrong keys and is given up, what waits goes on."""
        logger.error("the host's experts failed: %s", failure, exc_info=failure)
        error = RequestError(ENGINE_FAILURE, f"the experts on the host failed: {failure}")
        for sequence in list(self.planner.running):
            sequence.error = error
            if sequence.job in self._open:
                self._finish(sequence)
        self._start_over()
        assert self.offload is not None
        self.offload.take_failure()  # of calls that came after

    def _shrink(self, error: Exception) -> None:
        """Start everything that runs again in smaller steps. What the failed call was given may be lost with it."""
        reason = str(error).splitlines()[0]
        if not self.planner.shrink():
            self._start_over()
            raise EngineError(f"the device has no memory for a step of one token: {reason}") from error
        logger.warning(
            "out of device memory; going on with %d sequences and %d tokens a step: %s",
            self.planner.max_running,
            self.planner.max_tokens,
            reason,
        )
        self._start_over()
        self.metrics.shrinks += 1

    def _start_over(self) -> None:
        """All that runs waits again, with an empty pool and prefix cache."""
        if self.offload is not None:
            self.device.wait()  # the host serves one step at a time
        self._in_flight.clear()
        self.planner.start_again(self._new_cache())
        self.device.reset()

    def cancel(self) -> None:
        """Forget everything that is queued or running; the prefix cache stays."""
        self._in_flight.clear()
        while self.planner.running:
            self.planner.release(self.planner.running[-1])
        self.planner.waiting.clear()
        self._open.clear()
        self._finished.clear()

    def warm_up(self) -> None:
        """Compile the programs for every declared shape, so that nothing is compiled later."""
        self.device.warm_up()
        self.metrics.compilations = self.device.compilations

    def forget_prefixes(self) -> None:
        """Empty the prefix cache of all that no sequence uses."""
        self.cache.forget()

    def _new_cache(self) -> PageCache:
        cache = self.settings.cache
        return PageCache(self.memory.pages, cache.page_size, sharing=cache.prefix_sharing)

    def check_integrity(self) -> None:
        """Assert that every page of the pool is accounted for."""
        self.cache.check_integrity(sequence.pages for sequence in self.planner.running)

    def _count(self, call: InFlight) -> None:
        metrics = self.metrics
        metrics.calls += 1
        metrics.steps += call.plan.steps
        metrics.computed_tokens += call.real
        metrics.prefill_tokens += sum(chunk.count for chunk in call.plan.prefills)
        metrics.copied_pages += len(call.plan.copies)
        metrics.padding_tokens += call.padded - call.real
        metrics.count(self._demand_of(call.plan))
        metrics.peak_pages = max(metrics.peak_pages, self.cache.used)
        metrics.pages_in_use = self.cache.held
        metrics.pages_kept = self.cache.used - self.cache.held
        metrics.running = len(self.planner.running)
        metrics.preemptions = self.planner.preemptions
        metrics.compilations = self.device.compilations

    def _demand_of(self, plan: StepPlan) -> Demand:
        spans = [chunk.span for chunk in plan.decodes + plan.prefills]
        return self.demand.step(spans) if plan.prefills else self.demand.decode(spans)

    def _collect(self, call: InFlight) -> None:
        """Read a call's tokens and advance its sequences."""
        start = time.perf_counter()
        sampled, scores = call.read()
        read = time.perf_counter()
        self.metrics.wait_seconds += read - start
        if self.offload is not None and (failure := self.offload.take_failure()):
            self._fail_running(failure)
            return
        first = 0
        for row, chunk in enumerate(call.plan.decodes + call.plan.prefills):
            if chunk.sequence.request.score:
                opened = self._open[chunk.sequence]
                assert scores is not None and isinstance(opened, OpenRequest)
                opened.take_scores(chunk, scores[first : first + chunk.count])
            elif chunk.samples:
                if chunk.sequence.beams is None:
                    self._take_tokens(chunk, sampled, row)
                else:
                    self._take_candidates(chunk.sequence, sampled, row)
            if chunk.sequence.finished and chunk.sequence.job in self._open:
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
                sequence.error = _failure(sequence.request, error)
            self.metrics.generated_tokens += 1

    def _take_candidates(self, beam: Sequence, sampled: Sampled, row: int) -> None:
        opened = self._open.get(beam.job)
        if opened is None:
            return  # another beam's scores were no numbers
        assert isinstance(opened, OpenBeams)
        try:
            picks = opened.accept(beam, sampled, (0, row))
        except Exception as error:  # whatever it is, it concerns this request alone
            opened.beams.fail(_failure(beam.request, error))
            return
        if picks:
            self.planner.fork(opened.beams, picks)
        elif opened.done:
            self.metrics.generated_tokens += opened.generated

    def _finish(self, sequence: Sequence) -> None:
        opened = self._open.pop(sequence.job)
        self.planner.release(sequence)
        self.metrics.prompt_tokens += sequence.prompt_length
        self.metrics.cached_tokens += sequence.cached_tokens or 0
        if opened.done:
            self._finished.append(self._complete(opened))

    def _complete(self, opened: OpenRequest | OpenBeams) -> Completion:
        try:
            return opened.completion()
        except Exception as error:  # such as a tokenizer's: it concerns this request alone
            return Completion(request_id=opened.request.id, error=_failure(opened.request, error))


def _failure(request: Request, error: Exception) -> RequestError:
    logger.error("request %s failed", request.id, exc_info=error)
    return RequestError(ENGINE_FAILURE, f"{type(error).__name__}: {error}")
