"""One worker of a simulated fleet, step by step: it is sent requests bit by bit and serves them as they come."""

from __future__ import annotations

import numpy as np


class SimulatedWorker:
    """Prompts are computed in chunks beside all that decode, as many tokens as a step may have, first come, first served. A request
    starts when there is room for its prompt and its whole answer, so none loses its place. Made by `schedule.simulate.compiled`.

    Args:
      pool: a `SimulatedPool`.
      prompt, output: int64 [requests of the whole batch].
      token_seconds, key_seconds, step_seconds, linear, square: of a `Cost` and its joint time.
      slots: requests that run at once.
      credit: requests that may be here at once.
      max_tokens: of a step.

    Attributes:
      seconds: its clock. speed: of its machine, 1 is as the cost says.
      done: the first `finished` are requests that have ended since they were collected.
      here: requests that it was sent and that have not ended.
      prefilled: prompt tokens computed. spent: seconds of compute and memory time at speed 1.
    """

    def __init__(
        self,
        pool,
        prompt,
        output,
        token_seconds,
        key_seconds,
        step_seconds,
        linear,
        square,
        slots,
        credit,
        max_tokens,
    ):
        self.pool, self.prompt, self.output = pool, prompt, output
        self.token_seconds, self.key_seconds = token_seconds, key_seconds
        self.step_seconds, self.linear, self.square = step_seconds, linear, square
        self.slots, self.max_tokens = slots, max_tokens
        self.seconds, self.speed, self.spent = 0.0, 1.0, 0.0
        self.clock = self.prefilled = 0
        self.waiting = np.zeros(credit, np.int64)  # a ring
        self.first = self.waits = 0
        self.filling = np.zeros(slots, np.int64)  # a ring of those whose prompts are computed
        self.todo = np.zeros(slots, np.int64)
        self.head = self.fills = 0
        self.decoding = np.zeros(slots, np.int64)
        self.ends = np.zeros(slots, np.int64)  # the clock after its last step
        self.decodes = self.keys = 0
        self.next_end = 0
        self.done = np.zeros(credit, np.int64)
        self.finished = 0

    @property
    def here(self):
        return self.waits + self.fills + self.decodes

    def send(self, rows):
        for row in rows:
            self.waiting[(self.first + self.waits) % len(self.waiting)] = row
            self.waits += 1

    def advance(self, until, wanted):
        """Work until so many requests have ended, or nothing is left, or the clock has reached `until`."""
        while self.finished < wanted and self.here > 0 and self.seconds < until:
            self.step()

    def step(self):
        decodes, keys = self.decodes, self.keys
        tokens = decodes
        while tokens < self.max_tokens and (self.fills > 0 or self.admit()):
            place = self.head
            taken = min(self.max_tokens - tokens, self.todo[place])
            tokens += taken
            self.prefilled += taken
            self.todo[place] -= taken
            if self.todo[place] == 0:
                self.head = (place + 1) % self.slots
                self.fills -= 1
                self.generate(self.filling[place])
        self.book(tokens, keys)
        self.clock += 1
        self.keys += decodes
        if self.decodes > 0 and self.next_end <= self.clock:
            self.end()

    def admit(self):
        if self.waits == 0 or self.fills + self.decodes == self.slots:
            return False
        row = self.waiting[self.first]
        missing, idle = self.pool.missing(row)
        if missing + self.pool.alone[row] + self.output[row] > self.pool.free - idle:
            return False
        self.first = (self.first + 1) % len(self.waiting)
        self.waits -= 1
        place = (self.head + self.fills) % self.slots
        self.filling[place] = row
        self.todo[place] = self.pool.enter(row, self.output[row]) + self.pool.alone[row]
        self.fills += 1
        self.pool.shrink()
        return True

    def generate(self, row):
        """The step that computes the end of its prompt gives its first token."""
        self.decoding[self.decodes] = row
        self.ends[self.decodes] = self.clock + self.output[row]
        self.next_end = min(self.next_end, self.ends[self.decodes]) if self.decodes else self.ends[0]
        self.decodes += 1
        self.keys += self.prompt[row] + 1

    def book(self, tokens, keys):
        work, memory = tokens * self.token_seconds, keys * self.key_seconds
        compute = max(work, self.step_seconds)
        high, low = max(compute, memory), min(compute, memory)
        self.seconds += (high + low * (self.linear + self.square * low / high)) / self.speed
        self.spent += work + memory

    def end(self):
        kept, soonest = 0, self.clock + (1 << 60)
        for i in range(self.decodes):
            row = self.decoding[i]
            if self.ends[i] <= self.clock:
                self.keys -= self.prompt[row] + self.output[row]
                self.pool.leave(row, self.output[row])
                self.done[self.finished] = row
                self.finished += 1
            else:
                self.decoding[kept], self.ends[kept] = row, self.ends[i]
                soonest = min(soonest, self.ends[i])
                kept += 1
        self.decodes, self.next_end = kept, soonest

    def collect(self):
        """The requests that have ended."""
        rows = self.done[: self.finished].copy()
        self.finished = 0
        return rows

    def lose(self):
        """The process ends: what it was sent, and the seconds of compute and memory time that went into it."""
        rows = np.zeros(self.here, np.int64)
        for i in range(self.waits):
            rows[i] = self.waiting[(self.first + i) % len(self.waiting)]
        tokens = reads = count = 0
        count = self.waits
        for i in range(self.fills):
            place = (self.head + i) % self.slots
            rows[count] = self.filling[place]
            tokens += max(self.pool.alone[rows[count]] - self.todo[place], 0)
            count += 1
        for i in range(self.decodes):
            row = self.decoding[i]
            rows[count] = row
            made = self.output[row] - (self.ends[i] - self.clock)
            tokens += self.pool.alone[row] + made
            reads += self.prompt[row] * made + made * made // 2
            count += 1
        for i in range(self.fills + self.decodes):
            row = rows[self.waits + i]
            self.pool.leave(row, self.output[row])
        self.forget()
        self.waits = self.fills = self.decodes = self.keys = 0
        return rows, tokens * self.token_seconds + reads * self.key_seconds

    def forget(self):
        """The cache is empty again."""
        capacity = self.pool.capacity
        self.pool.capacity = 0
        self.pool.shrink()
        self.pool.capacity = capacity
