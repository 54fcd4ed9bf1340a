"""One worker of a simulated fleet, step by step: it is sent requests bit by bit and serves them as they come."""

from __future__ import annotations

import numpy as np

from jaxinfer.schedule.scanner import LEFT, RIGHT


class SimulatedWorker:
    """Prompts are computed in chunks beside all that decode, as a worker's own scanner steers. Where the pool is full the newest
    request loses its place and all that it had. Made by `schedule.simulate.compiled`.

    Args:
      scanner: a `FedScanner`.
      pool: a `SimulatedPool`.
      prompt, output: int64 [requests of the whole batch].
      token_seconds, key_seconds, step_seconds, linear, square: of a `Cost` and its joint time.
      slots: requests that run at once.
      ahead: int64 [2], requests of each side that may wait here.

    Attributes:
      seconds: its clock. speed: of its machine, 1 is as the cost says.
      done: the first `finished` are requests that have ended since they were collected.
      here: requests that it was sent and that have not ended. waits: int64 [2], those of each side that have not begun.
      prefilled: prompt tokens computed. spent: seconds of compute and memory time at speed 1.
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
        slots,
        ahead,
    ):
        places = slots + ahead.sum()
        self.scanner, self.pool, self.prompt, self.output = scanner, pool, prompt, output
        self.token_seconds, self.key_seconds = token_seconds, key_seconds
        self.step_seconds, self.linear, self.square = step_seconds, linear, square
        self.slots, self.ahead = slots, ahead
        self.seconds, self.speed, self.spent = 0.0, 1.0, 0.0
        self.clock = self.prefilled = self.preemptions = 0
        self.row = np.zeros(places, np.int64)  # at each place
        self.todo = np.zeros(places, np.int64)  # prompt tokens
        self.ends = np.zeros(places, np.int64)  # the clock after its last step
        self.free = np.arange(places)  # the first `frees` are free places
        self.frees = places
        self.waiting = np.zeros((2, places), np.int64)  # rings
        self.first, self.waits = np.zeros(2, np.int64), np.zeros(2, np.int64)
        self.filling = np.zeros(places, np.int64)  # a ring of those whose prompts are computed
        self.head = self.fills = 0
        self.decoding = np.zeros(places, np.int64)
        self.decodes = self.keys = 0
        self.next_end = 0
        self.done = np.zeros(places, np.int64)
        self.finished = 0

    @property
    def here(self):
        return self.waits.sum() + self.fills + self.decodes

    @property
    def hungry(self):
        """Whether few of a side wait of which there are more."""
        few = (2 * self.waits < self.ahead) & (self.scanner.coming[:, 0] > 0)
        return few[LEFT] or few[RIGHT]

    def send(self, rows, side):
        for row in rows:
            self.frees -= 1
            place = self.free[self.frees]
            self.row[place] = row
            self.scanner.arrive(place, side, self.prompt[row], self.pool.alone[row], float(self.output[row]))
            self.waiting[side, (self.first[side] + self.waits[side]) % len(self.free)] = place
            self.waits[side] += 1

    def advance(self, until, wanted):
        """Work until so many requests have ended, or more should come, or nothing is left, or the clock has reached `until`."""
        while self.finished < wanted and self.here > 0 and self.seconds < until:
            self.step()
            if self.hungry:
                break

    def step(self):
        decodes, keys = self.decodes, self.keys
        left = self.scanner.prefill(decodes, keys)
        tokens = decodes
        while left > 0 and (self.fills > 0 or self.admit(RIGHT) or self.admit(LEFT)):
            place = self.filling[self.head]
            taken = min(left, self.todo[place])
            left -= taken
            tokens += taken
            self.prefilled += taken
            self.todo[place] -= taken
            if self.todo[place] == 0:
                self.head = (self.head + 1) % len(self.filling)
                self.fills -= 1
                self.generate(place)
        self.scanner.step(tokens, keys)
        self.book(tokens, keys)
        self.clock += 1
        self.keys += decodes
        self.pool.used += decodes
        if self.decodes > 0 and self.next_end <= self.clock:
            self.end()
        while not self.pool.shrink():
            self.preempt()

    def admit(self, side):
        """Start the next request of a side, if it may and there is room."""
        running = self.fills + self.decodes
        if running == self.slots or self.waits[side] == 0:
            return False
        place = self.waiting[side, self.first[side]]
        if not self.scanner.wants(side, place):
            return False
        row = self.row[place]
        missing, idle = self.pool.missing(row)
        if running and missing + self.pool.alone[row] + 1 + running > self.pool.free - idle:
            return False
        self.first[side] = (self.first[side] + 1) % len(self.free)
        self.waits[side] -= 1
        self.scanner.start(place, side)
        self.filling[(self.head + self.fills) % len(self.filling)] = place
        self.todo[place] = self.pool.enter(row, 0) + self.pool.alone[row]
        self.fills += 1
        self.pool.shrink()
        return True

    def generate(self, place):
        """The step that computes the end of its prompt gives its first token."""
        row = self.row[place]
        self.decoding[self.decodes] = place
        self.ends[place] = self.clock + self.output[row]
        self.next_end = min(self.next_end, self.ends[place]) if self.decodes else self.ends[place]
        self.decodes += 1
        self.keys += self.prompt[row] + 1
        self.pool.used += 1

    def book(self, tokens, keys):
        work, memory = tokens * self.token_seconds, keys * self.key_seconds
        compute = max(work, self.step_seconds)
        high, low = max(compute, memory), min(compute, memory)
        self.seconds += (high + low * (self.linear + self.square * low / high)) / self.speed
        self.spent += work + memory

    def end(self):
        kept, soonest = 0, self.clock + (1 << 60)
        for i in range(self.decodes):
            place = self.decoding[i]
            row = self.row[place]
            if self.ends[place] <= self.clock:
                self.keys -= self.prompt[row] + self.output[row]
                self.pool.leave(row, self.output[row])
                self.scanner.finish(place, self.output[row])
                self.release(place)
                self.done[self.finished] = row
                self.finished += 1
            else:
                self.decoding[kept] = place
                soonest = min(soonest, self.ends[place])
                kept += 1
        self.decodes, self.next_end = kept, soonest

    def release(self, place):
        self.free[self.frees] = place
        self.frees += 1

    def made(self, place):
        """Tokens of its answer so far, while it decodes."""
        return self.output[self.row[place]] - (self.ends[place] - self.clock)

    def preempt(self):
        """The newest begins anew, first of its side."""
        if self.fills > 0:
            self.fills -= 1
            place = self.filling[(self.head + self.fills) % len(self.filling)]
            made = 0
        else:
            self.decodes -= 1
            place = self.decoding[self.decodes]
            made = self.made(place)
            self.keys -= self.prompt[self.row[place]] + made
        self.pool.leave(self.row[place], made)
        self.scanner.preempt(place)
        side = self.scanner.origin(place)
        self.first[side] = (self.first[side] - 1) % len(self.free)
        self.waiting[side, self.first[side]] = place
        self.waits[side] += 1
        self.preemptions += 1

    def collect(self):
        """The requests that have ended."""
        rows = self.done[: self.finished].copy()
        self.finished = 0
        return rows

    def lose(self):
        """The process ends: what it was sent, and the seconds of compute and memory time that went into it."""
        rows = np.zeros(self.here, np.int64)
        tokens = reads = count = 0
        for side in range(2):
            for i in range(self.waits[side]):
                place = self.waiting[side, (self.first[side] + i) % len(self.free)]
                rows[count] = self.row[place]
                self.scanner.begin(place)
                self.release(place)
                count += 1
        for i in range(self.fills + self.decodes):
            place = (
                self.filling[(self.head + i) % len(self.filling)]
                if i < self.fills
                else self.decoding[i - self.fills]
            )
            row = self.row[place]
            made = 0 if i < self.fills else self.made(place)
            tokens += made + self.pool.alone[row] - (min(self.todo[place], self.pool.alone[row]))
            reads += self.prompt[row] * made + made * made // 2
            self.pool.leave(row, made)
            self.scanner.finish(place, made)
            self.release(place)
            rows[count] = row
            count += 1
        self.forget()
        self.waits[:] = 0
        self.fills = self.decodes = self.keys = 0
        return rows, tokens * self.token_seconds + reads * self.key_seconds

    def forget(self):
        """The cache is empty again."""
        capacity = self.pool.capacity
        self.pool.capacity = 0
        self.pool.shrink()
        self.pool.capacity = capacity
