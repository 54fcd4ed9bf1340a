"""Who is admitted next, and how many prompt tokens a step takes: a fixed order, the paper's dual scanner, and ours.

A scanner speaks of requests by number and of time by steps, so that the engine and the simulator ask the same object. The
classes use only what numba's jitclass takes: `simulate.compiled` makes fast ones of the very same text.
"""

from __future__ import annotations

import numpy as np

LEFT, RIGHT = 0, 1


class FixedOrder:
    """Requests in a given order, as many as their expected lengths leave room for; every step is filled up.

    Args:
      order: int64 [requests].
      prompt: int64 [requests], tokens.
      length: float64 [requests], expected answers.
      capacity: tokens of the KV pool.
      max_tokens: of a step.
    """

    def __init__(self, order, prompt, length, capacity, max_tokens):
        self.order = order
        self.reads = prompt + length / 2  # what a request holds on average
        self.capacity = capacity
        self.max_tokens = max_tokens
        self.held = 0.0
        self.at = 0

    def peek(self, side):
        """The next request of a side; -1 if it has none."""
        if side == RIGHT or self.at == len(self.order):
            return -1
        return self.order[self.at]

    def take(self, side):
        request = self.peek(side)
        self.at += 1
        return request

    def wants(self, side, request):
        """Whether the side's next request may start now, as far as its share of the pool goes."""
        return self.held == 0 or self.held + self.reads[request] <= self.capacity

    def prefill(self, decoding, keys):
        """Prompt tokens for a step in which `decoding` sequences read `keys` tokens of keys and values."""
        return max(self.max_tokens - decoding, 0)

    def start(self, request, side):
        self.held += self.reads[request]

    def finish(self, request, generated):
        self.held = max(self.held - self.reads[request], 0.0)

    def preempt(self, request):
        self.held = max(self.held - self.reads[request], 0.0)

    def overdue(self, request, generated):
        """A running request has generated at least twice what was expected."""

    def step(self, tokens, keys):
        """A step was planned."""


class PaperScanner:
    """BlendServe's dual scanner (arXiv 2411.16102, section 5.3). Memory shares of both sides follow from the densities of the
    units under the two cursors, so that the pool as a whole has the batch's density; a side's prompt tokens a step are what
    keeps its share full. The shares stay as they are while a unit lasts.

    Args:
      order, starts, density, root: of a `Plan`.
      prompt, alone: int64 [requests], prompt tokens, and those of them that no other request has.
      length: float64 [requests], expected answers.
      capacity: tokens of the KV pool.
      max_tokens: of a step.
      quantum: steps are filled up to a multiple of so many tokens.
    """

    def __init__(self, order, starts, density, root, prompt, alone, length, capacity, max_tokens, quantum):
        self.order = order
        self.density = density
        self.root = root
        self.reads = prompt + length / 2
        self.capacity = float(capacity)
        self.max_tokens = max_tokens
        self.quantum = quantum
        self.unit = np.zeros(len(order), np.int64)
        self.unit_chunk = np.zeros(len(density))  # prompt tokens a step for each token of the pool
        for unit in range(len(density)):
            reads = prompts = answers = 0.0
            for place in range(starts[unit], starts[unit + 1]):
                request = order[place]
                self.unit[place] = unit
                reads += self.reads[request]
                prompts += alone[request]
                answers += length[request]
            count = starts[unit + 1] - starts[unit]
            self.unit_chunk[unit] = prompts / max(answers, 1.0) * count / max(reads, 1.0)
        self.left = 0
        self.right = len(order) - 1
        self.side = np.zeros(len(prompt), np.int8)
        self.held = np.zeros(2)
        self.share = np.zeros(2)
        self.chunk = 0.0
        self.divide()

    def divide(self):
        """Shares of the pool for the units under the cursors."""
        if self.left > self.right:
            self.share[:] = self.capacity
            return
        first, last = self.unit[self.left], self.unit[self.right]
        high, low = min(self.density[first], 1e6), min(self.density[last], 1e6)
        part = 1.0 if low >= self.root else 0.0  # one kind is used up: the pool is for the other
        if high > self.root > low:
            part = (self.root - low) / (high - low)
        self.share[LEFT] = part * self.capacity
        self.share[RIGHT] = (1 - part) * self.capacity
        self.chunk = self.share[LEFT] * self.unit_chunk[first] + self.share[RIGHT] * self.unit_chunk[last]

    def peek(self, side):
        if self.left > self.right:
            return -1
        return self.order[self.left if side == LEFT else self.right]

    def take(self, side):
        request = self.peek(side)
        if side == LEFT:
            self.left += 1
            same = self.left <= self.right and self.unit[self.left - 1] == self.unit[self.left]
        else:
            self.right -= 1
            same = self.left <= self.right and self.unit[self.right + 1] == self.unit[self.right]
        if not same:
            self.divide()
        return request

    def wants(self, side, request):
        return self.held[side] + self.reads[request] <= self.share[side] or self.held[0] + self.held[1] == 0

    def prefill(self, decoding, keys):
        total = decoding + max(int(self.chunk), 1)
        whole = max(int(total / self.quantum + 0.5), 1) * self.quantum
        return max(min(whole, self.max_tokens) - decoding, 0)

    def start(self, request, side):
        self.side[request] = side
        self.held[side] += self.reads[request]

    def finish(self, request, generated):
        side = self.side[request]
        self.held[side] = max(self.held[side] - self.reads[request], 0.0)

    def preempt(self, request):
        self.finish(request, 0)

    def overdue(self, request, generated):
        """Severely underestimated: from now on it counts to the memory-heavy side."""
        if self.side[request] == LEFT:
            self.finish(request, 0)
            self.start(request, RIGHT)

    def step(self, tokens, keys):
        pass
