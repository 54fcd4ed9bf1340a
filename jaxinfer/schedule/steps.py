"""The steps of a simulation: admission, chunked prefill, decode, preemption, and the time that each takes."""

from __future__ import annotations

import numpy as np

from jaxinfer.schedule.scanner import LEFT, RIGHT

_LATE = 1024  # steps between two looks for answers far longer than expected


class SimulatedSteps:
    """Args:
    scanner: decides who starts and how many prompt tokens a step takes.
    pool: a `SimulatedPool`.
    prompt, output: int64 [requests].
    token_seconds, key_seconds, step_seconds, linear, square: of a `Cost` and its joint time.
    points: of the series.
    """

    def __init__(
        self,
        scanner,
        pool,
        prompt,
        output,
        token_seconds,
        key_seconds,
        step_seconds,
        linear,
        square,
        points,
    ):
        count = len(prompt)
        self.scanner, self.pool, self.prompt, self.output = scanner, pool, prompt, output
        self.token_seconds, self.key_seconds = token_seconds, key_seconds
        self.step_seconds, self.linear, self.square = step_seconds, linear, square
        self.todo = np.zeros(count, np.int64)  # tokens still to prefill
        self.done = np.zeros(count, np.int64)  # generated before the present start
        self.since = np.zeros(count, np.int64)  # step of the first decode of the present start
        self.ends = np.full(count, -1, np.int64)  # the clock after its last step
        self.side = np.zeros(count, np.int64)
        self.following = np.full(count, -1, np.int64)  # in the list of those that end in the same step
        self.preceding = np.full(count, -1, np.int64)
        self.ending = np.full(int(output.max()) + 2 if count else 2, -1, np.int64)
        self.waiting = np.zeros((2, count + 1), np.int64)  # rings of requests that prefill, by side
        self.heads = np.zeros(2, np.int64)
        self.tails = np.zeros(2, np.int64)
        self.back = np.zeros((2, count + 1), np.int64)  # preempted ones, first in line
        self.backs = np.zeros(2, np.int64)
        self.newest = np.zeros(2 * count + 16, np.int64)  # started requests, old entries among them
        self.started = np.zeros(2 * count + 16, np.int64)
        self.stack = 0
        self.turn = np.full(count, -1, np.int64)  # of its present start; -1 while it does not run
        self.turns = 0
        self.decoding = self.keys = self.running = self.finished = 0
        self.clock = self.computed = self.cached = self.preemptions = 0
        self.seconds = self.compute = self.memory = 0.0
        self.smaller = self.bend = 0.0
        self.series = np.zeros((points, 3))
        self.stretch = 1

    def run(self):
        while self.finished < len(self.scanner.order):
            self.step()

    def step(self):
        decoding, keys = self.decoding, self.keys
        budget = self.scanner.prefill(decoding, keys)
        tokens = decoding
        for side in (RIGHT, LEFT):
            tokens += self.prefill(side, budget - (tokens - decoding))
        if tokens == 0:
            tokens += self.prefill(LEFT, 1) or self.prefill(RIGHT, 1)
        self.scanner.step(tokens, keys)
        self.book(tokens, keys)
        self.decode(decoding)
        while not self.pool.shrink():
            self.preempt()

    def book(self, tokens, keys):
        """Time passes."""
        work = tokens * self.token_seconds
        compute, memory = max(work, self.step_seconds), keys * self.key_seconds
        high, low = max(compute, memory), min(compute, memory)
        taken = high + low * (self.linear + self.square * low / high)
        self.seconds += taken
        self.smaller += low
        self.bend += low * low / high
        self.compute += work
        self.memory += memory
        self.computed += tokens
        at = self.clock // self.stretch
        if at == len(self.series):
            half = at // 2
            for i in range(half):
                self.series[i] = self.series[2 * i] + self.series[2 * i + 1]
            self.series[half:] = 0
            self.stretch *= 2
            at = half
        self.series[at, 0] += taken
        self.series[at, 1] += work
        self.series[at, 2] += memory
        self.clock += 1

    def prefill(self, side, budget):
        """Up to `budget` prompt tokens of a side, of those that have begun first; returns how many."""
        left, ring = budget, self.waiting.shape[1]
        while left > 0:
            if self.heads[side] == self.tails[side] and not self.admit(side):
                break
            request = self.waiting[side, self.heads[side]]
            taken = min(left, self.todo[request])
            left -= taken
            self.todo[request] -= taken
            if self.todo[request] == 0:
                self.heads[side] = (self.heads[side] + 1) % ring
                self.generate(request)
        return budget - left

    def admit(self, side):
        """Start the next request of a side, if it may and there is room."""
        again = self.backs[side] > 0
        if again:
            request = self.back[side, self.backs[side] - 1]
        else:
            request = self.scanner.peek(side)
            if request < 0 or not self.scanner.wants(side, request):
                return False
        missing, idle = self.pool.missing(request)
        needed = missing + self.pool.alone[request] + self.done[request] + 1 + self.running
        if self.running and needed > self.pool.free - idle:
            return False
        if again:
            self.backs[side] -= 1
        else:
            self.scanner.take(side)
        self.scanner.start(request, side)
        self.start(request, side)
        if not again:
            self.cached += self.prompt[request] - self.todo[request]
        return True

    def start(self, request, side):
        computed = self.pool.enter(request, self.done[request])
        self.todo[request] = computed + self.pool.alone[request] + self.done[request]
        self.pool.shrink()
        self.side[request] = side
        ring = self.waiting.shape[1]
        self.waiting[side, self.tails[side]] = request
        self.tails[side] = (self.tails[side] + 1) % ring
        self.running += 1
        self.turns += 1
        self.turn[request] = self.turns
        if self.stack == len(self.newest):
            self.forget()
        self.newest[self.stack] = request
        self.started[self.stack] = self.turns
        self.stack += 1

    def forget(self):
        """Drop entries of requests that no longer run from the stack of starts."""
        kept = 0
        for i in range(self.stack):
            if self.turn[self.newest[i]] == self.started[i]:
                self.newest[kept], self.started[kept] = self.newest[i], self.started[i]
                kept += 1
        self.stack = kept

    def generate(self, request):
        """Its prompt is computed: this step gives its first token, those from the next one on the others."""
        self.done[request] += 1
        self.pool.used += 1
        rest = self.output[request] - self.done[request]
        if rest == 0:
            self.finish(request)
            return
        self.since[request] = self.clock + 1
        self.ends[request] = self.clock + 1 + rest
        at = self.ends[request] % len(self.ending)
        first = self.ending[at]
        self.following[request], self.preceding[request] = first, -1
        if first >= 0:
            self.preceding[first] = request
        self.ending[at] = request
        self.decoding += 1
        self.keys += self.prompt[request] + self.done[request]

    def decode(self, decoding):
        """Every request that decoded in the step just booked has one more token; some end with it."""
        self.keys += decoding
        self.pool.used += decoding
        at = self.clock % len(self.ending)
        request = self.ending[at]
        self.ending[at] = -1
        while request >= 0:
            after = self.following[request]
            self.decoding -= 1
            self.done[request] = self.output[request]
            self.keys -= self.prompt[request] + self.output[request]
            self.finish(request)
            request = after
        if self.clock % _LATE == 0:
            self.look_for_late_ones()

    def look_for_late_ones(self):
        for i in range(self.stack):
            request = self.newest[i]
            if self.turn[request] == self.started[i] and self.ends[request] > self.clock:
                self.scanner.overdue(request, self.done[request] + self.clock - self.since[request])

    def unlist(self, request):
        """It does not end when it was to."""
        before, after = self.preceding[request], self.following[request]
        if after >= 0:
            self.preceding[after] = before
        if before >= 0:
            self.following[before] = after
        else:
            self.ending[self.ends[request] % len(self.ending)] = after

    def finish(self, request):
        self.pool.leave(request, self.output[request])
        self.scanner.finish(request, self.output[request])
        self.running -= 1
        self.finished += 1
        self.turn[request] = -1
        self.ends[request] = -1

    def preempt(self):
        """The newest gives up its room and starts again, first of its side, from the tokens that it has."""
        while self.turn[self.newest[self.stack - 1]] != self.started[self.stack - 1]:
            self.stack -= 1
        self.stack -= 1
        request = self.newest[self.stack]
        if self.ends[request] > 0:
            self.unlist(request)
            self.decoding -= 1
            self.done[request] += self.clock - self.since[request]
            self.keys -= self.prompt[request] + self.done[request]
        self.pool.leave(request, self.done[request])
        self.scanner.preempt(request)
        side = self.side[request]
        if self.todo[request]:  # the newest is the last of those that still prefill
            self.tails[side] = (self.tails[side] - 1) % self.waiting.shape[1]
        self.ends[request] = -1
        self.turn[request] = -1
        self.running -= 1
        self.back[side, self.backs[side]] = request
        self.backs[side] += 1
        self.preemptions += 1
