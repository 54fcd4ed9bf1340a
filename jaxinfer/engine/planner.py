"""Which sequences run, and what each step does with them: admission, chunked prefill, decode, preemption."""

from __future__ import annotations

from jaxinfer.config import EngineSettings
from jaxinfer.engine.admission import Admission, Fifo
from jaxinfer.engine.beam_search import Pick
from jaxinfer.engine.beams import Beams
from jaxinfer.engine.pages import SequencePages
from jaxinfer.engine.plan import Chunk, StepPlan, TokensNeeded
from jaxinfer.engine.sequence import Sequence
from jaxinfer.kvcache.cache import PageCache
from jaxinfer.kvcache.prefix import Node
from jaxinfer.models.config import RopeConfig
from jaxinfer.models.rotary import prefix_namespace, restarts_at

LOOKAHEAD = 256  # waiting sequences that one step considers for admission


class Planner:
    """Decides the next step: whom `waiting` lets start, what fits, and which chunks and tokens it computes."""

    def __init__(
        self, settings: EngineSettings, cache: PageCache, rope: RopeConfig, waiting: Admission | None = None
    ):
        self.settings = settings
        self.pages = SequencePages(cache, rope)
        self.waiting: Admission = Fifo() if waiting is None else waiting
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.max_running = settings.max_seqs
        self.max_tokens = settings.max_tokens_per_step
        self._rope = rope
        self._restart = restarts_at(rope)
        self._slots = list(range(settings.max_seqs - 1, -1, -1))

    @property
    def cache(self) -> PageCache:
        return self.pages.cache

    def plan(self, *, in_flight: bool) -> StepPlan:
        """The next step, booked on its sequences; empty when there is nothing to do before tokens are read.

        Raises:
          TokensNeeded: `in_flight` steps must be read first.
        """
        self._restart_stretched(in_flight)
        plan = self._plan_step(in_flight)
        while not plan and not in_flight and len(self.running) > 1:
            self._preempt(self.waiting.victim(self.running))  # chunked prefills that took each other's pages
            plan = self._plan_step(in_flight)
        return plan

    def _plan_step(self, in_flight: bool) -> StepPlan:
        plan = StepPlan()
        decoding = [s for s in self.running if s.decoding and s.ready]
        prefilling = [s for s in self.running if not s.decoding and s.ready]
        if not prefilling and not len(self.waiting) and decoding:
            plan.steps = self._decode_steps(decoding)
        plan.decodes = self._plan_decodes(decoding, plan, in_flight)
        keys = sum(chunk.start + 1 for chunk in plan.decodes)
        room = self.max_tokens - len(plan.decodes)
        budget = room if plan.steps > 1 else self.waiting.prefill_budget(len(plan.decodes), keys, room)
        for sequence in prefilling:
            if sequence.slot >= 0 and self.pages.has_begun(sequence):  # not preempted by the decodes above
                budget -= self._plan_chunk(sequence, budget, plan)
        if plan.steps == 1:
            self._admit(budget, plan)
        if plan:
            tokens = sum(chunk.count for chunk in plan.decodes + plan.prefills)
            self.waiting.booked(plan.steps, tokens, keys * plan.steps)
        return plan

    def release(self, sequence: Sequence) -> None:
        """Give back the slot and the pages of a finished or preempted sequence, of a beam with all beams of its search; what
        it computed stays cached."""
        for each in sequence.siblings:
            self.pages.give_back(each)
            self.running.remove(each)
        self._take_slots_back(sequence)
        if sequence.finished:
            self.waiting.finished(sequence)

    def start_again(self, cache: PageCache) -> None:
        """All keys are lost: every running sequence waits again, in its order, for pages of the new cache."""
        firsts = [sequence for sequence in self.running if sequence is sequence.siblings[0]]
        for sequence in reversed(firsts):
            self._take_slots_back(sequence)
            if not sequence.finished:
                self._rewind(sequence)
                self.waiting.preempted(sequence)
        self.running.clear()
        self.pages = SequencePages(cache, self._rope)

    def fork(self, beams: Beams, picks: list[Pick]) -> None:
        """The beams of a search go on as it picked them."""
        first, before = self.running.index(beams.sequences[0]), len(beams.sequences)
        beams.fork(picks, self.cache)
        self.running[first : first + before] = beams.sequences

    def shrink(self) -> bool:
        """Run at most half as much at once as so far; False, and all at once again, if that is as little as can be."""
        if self.max_running == 1 and self.max_tokens <= 1:
            self.max_running, self.max_tokens = self.settings.max_seqs, self.settings.max_tokens_per_step
            return False
        self.max_running = max(min(self.max_running, len(self.running) or self.max_running) // 2, 1)
        self.max_tokens = max(self.max_tokens // 2, 1)
        return True

    def _decode_steps(self, decoding: list[Sequence]) -> int:
        if any(s.beams is not None for s in self.running):
            return 1  # whose next tokens the host has to choose
        longest = max(s.limit - s.planned for s in decoding)
        return min(self.settings.decode_steps, longest)

    def _plan_decodes(self, decoding: list[Sequence], plan: StepPlan, in_flight: bool) -> list[Chunk]:
        if plan.steps > 1 and not all(self.pages.reserve(s, self._steps_of(s, plan.steps)) for s in decoding):
            plan.steps = 1
        for sequence in decoding:
            while sequence.slot >= 0 and not self.pages.reserve(sequence, 1):
                if in_flight:
                    raise TokensNeeded
                self._preempt(self.waiting.victim(self.running))
        chunks = []
        for sequence in decoding:
            if sequence.slot >= 0:
                count = self._steps_of(sequence, plan.steps)
                chunks.append(Chunk(sequence, sequence.computed, count, decodes=True))
                if sequence.copied is not None:
                    plan.copies.append(sequence.copied)
                    sequence.copied = None
                sequence.advance(count)
        return chunks

    def _steps_of(self, sequence: Sequence, steps: int) -> int:
        if self._restart is not None and sequence.rope_floor <= self._restart:
            steps = min(steps, self._restart - sequence.computed)
        return min(steps, sequence.limit - sequence.planned)

    def _plan_chunk(self, sequence: Sequence, budget: int, plan: StepPlan) -> int:
        """Add the next chunk of a prefilling sequence; returns how many tokens it takes."""
        sparse = sequence.computed >= sequence.dense_tokens
        most = 1 if sparse else sequence.dense_tokens - sequence.computed
        count = min(budget, self.settings.chunk, sequence.planned - sequence.computed, most)
        if count <= 0 or not self.pages.reserve(sequence, count):
            return 0
        start = sequence.computed
        sequence.advance(count)
        plan.prefills.append(Chunk(sequence, start, count, samples=sequence.decoding, sparse=sparse))
        self.pages.publish(sequence, min(sequence.computed, sequence.prompt_length))
        return count

    def _admit(self, budget: int, plan: StepPlan) -> None:
        deferred: list[Sequence] = []
        pledged = sum(self.pages.to_come(sequence) for sequence in self.running if not sequence.decoding)
        while (
            self._places > 0
            and budget > 0
            and len(deferred) < LOOKAHEAD
            and (sequence := self.waiting.next()) is not None
        ):
            if sequence.awaits_prefix:
                deferred.append(sequence)
                continue
            path = self.pages.match(sequence)
            if self.pages.is_being_computed(sequence, len(path), self.running):
                deferred.append(sequence)
                continue
            if not (self._has_places(sequence) and self._has_room(sequence, path, pledged)):
                deferred.append(sequence)
                break
            self._start(sequence, path)
            budget -= self._plan_chunk(sequence, budget, plan)
            pledged += sum(map(self.pages.to_come, sequence.siblings))
        self.waiting.put_back(deferred)

    @property
    def _places(self) -> int:
        """Sequences that may start; a search has a place for each of its beams, whether they are there yet or not."""
        return self.max_running - (self.settings.max_seqs - len(self._slots))

    def _has_places(self, sequence: Sequence) -> bool:
        return sequence.beams is None or not self.running or sequence.beams.width <= self._places

    def _has_room(self, sequence: Sequence, path: list[Node], pledged: int) -> bool:
        """Room for its known tokens beside the `pledged` pages of prompts that are not computed to their end, and a page
        for every sequence that runs, so that admission does not preempt."""
        if not self.running:
            return True
        needed = sum(map(self.pages.to_come, sequence.siblings)) - len(path) + len(self.running)
        if sequence.beams is not None:
            needed += sequence.beams.width - len(sequence.siblings)  # each will write to a page of its own
        return self.pages.has(needed + pledged, path)

    def _start(self, sequence: Sequence, path: list[Node]) -> None:
        sequence.slot = self._slots.pop()
        self.pages.begin(sequence, path)
        self.running.append(sequence)
        if sequence.beams is not None:
            self._start_beams(sequence.beams)
        self.waiting.started(sequence)

    def _start_beams(self, beams: Beams) -> None:
        """Beside the first beam of a search, which has just started."""
        others = beams.sequences[1:]
        for sequence in others:
            sequence.slot = self._slots.pop()
            sequence.tail = self.pages.root(sequence)
        beams.slots = [self._slots.pop() for _ in range(beams.width - len(beams.sequences))]
        self.running += others

    def _preempt(self, sequence: Sequence) -> None:
        self.release(sequence)
        self._rewind(sequence)
        self.waiting.preempted(sequence.siblings[0])
        self.preemptions += 1

    def _rewind(self, sequence: Sequence) -> None:
        if sequence.beams is None:
            sequence.rewind()
        else:
            sequence.beams.rewind(self.cache.page_size)

    def _take_slots_back(self, sequence: Sequence) -> None:
        self._slots += [each.slot for each in sequence.siblings]
        if sequence.beams is not None:
            self._slots += sequence.beams.slots
            sequence.beams.slots = []

    def _must_restart(self, sequence: Sequence) -> bool:
        return (
            self._restart is not None
            and sequence.rope_floor <= self._restart
            and sequence.computed + 1 > self._restart
        )

    def _restart_stretched(self, in_flight: bool) -> None:
        """Start sequences that outgrow the original context again, with every key rotated for the long one."""
        for sequence in [s for s in self.running if s.decoding and s.ready and self._must_restart(s)]:
            if in_flight:
                raise TokensNeeded
            if sequence.slot >= 0:  # else the beams of a search went together
                self._preempt(sequence)
            sequence.rope_floor = sequence.planned
            sequence.namespace = prefix_namespace(self._rope, sequence.planned)
