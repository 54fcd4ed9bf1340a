"""The dual scanner of a worker: requests come to it bit by bit, and its driver says what else is still to come."""

from __future__ import annotations

import numpy as np

from jaxinfer.schedule.blend import _PATIENCE, BlendScanner
from jaxinfer.schedule.scanner import LEFT, RIGHT

TOKENS, ANSWERS, READS = (
    0,
    1,
    2,
)  # of work to come: tokens through the model, those of answers, and keys that are read


class FedScanner(BlendScanner):
    """Steers as a `BlendScanner` does, but knows only what it was sent: a request is the number of a place that it has from its
    coming to its end. Expected lengths are the driver's.

    Args:
      places: requests that may be here at once.
      token_seconds, step_seconds: of a `Cost`.
      capacity: tokens of the KV pool.
      slots: most requests that run at once.
      max_tokens: of a step.
      quantum: steps are filled up to a multiple of so many tokens.
    """

    def __init__(self, places, token_seconds, step_seconds, capacity, slots, max_tokens, quantum):
        self.root = 1.0
        self.density = np.zeros(places)  # only which side of the batch's: 2 or 0
        self.prompt = np.zeros(places, np.int64)
        self.alone = np.zeros(places, np.int64)
        self.length = np.zeros(places)
        self.free_tokens = int(step_seconds / token_seconds)
        self.capacity, self.slots = capacity, slots
        self.max_tokens, self.quantum = max_tokens, quantum
        self.clock = self.running = self.heavies = 0
        self.looked = -_PATIENCE
        self.heavy = np.zeros(64, np.int64)
        self.place = np.full(places, -1, np.int64)
        self.since = np.full(places, -1, np.int64)
        self.light_held = 0.0
        self.holds = np.zeros(places)
        self.coming = np.zeros((2, 3))  # by side, what the driver still has for this worker
        self.waiting = np.zeros((2, 3))
        self.waits = np.zeros(places, np.bool_)  # whether `waiting` has the work of a place
        self.light_part = self.light_rows = 0.0

    def outlook(self, coming):
        """float64 [2, 3] by side: what the driver still has for this worker."""
        self.coming[:] = coming
        left = self.remaining()
        self.light_part = left[LEFT, READS] / max(left[:, READS].sum(), 1.0)
        self.light_rows = left[LEFT, ANSWERS] / max(left[:, ANSWERS].sum(), 1.0)

    def arrive(self, request, side, prompt, alone, length):
        """A request waits at a place: its prompt tokens, those of them that no other has, and its expected answer."""
        self.density[request] = 2.0 if side == LEFT else 0.0
        self.prompt[request], self.alone[request], self.length[request] = prompt, alone, length
        self.wait(request)

    def wait(self, request):
        self.waits[request] = True
        self.waiting[self.origin(request)] += self.work(request)

    def begin(self, request):
        """It waits no longer."""
        if self.waits[request]:
            self.waits[request] = False
            self.waiting[self.origin(request)] -= self.work(request)

    def work(self, request):
        length = self.length[request]
        reads = self.prompt[request] * length + length * length / 2
        return np.array([self.alone[request] + length, length, reads])

    def expected(self, request):
        return self.length[request]

    @property
    def balance(self):
        """Tokens to compute for each key read, over all that is left for this worker."""
        left = self.remaining()
        return max(left[:, TOKENS].sum(), 1.0) / max(left[:, READS].sum(), 1.0)

    def remaining(self):
        """float64 [2, 3] by side: the work that is coming, that waits, and that is left of what runs."""
        left = self.coming + self.waiting
        left[LEFT, TOKENS] += self.light_held / 2  # half done on average
        for i in range(self.heavies):
            request = self.heavy[i]
            age = self.clock - self.since[request]
            rest = max(self.length[request] - age, 0.0)
            left[RIGHT, TOKENS] += rest
            left[RIGHT, ANSWERS] += rest
            left[RIGHT, READS] += (self.prompt[request] + age) * rest + rest * rest / 2
        return left

    def peek(self, side):
        """There may always come another."""
        return 0

    def origin(self, request):
        return LEFT if self.density[request] > self.root else RIGHT

    def finish(self, request, generated):
        self.stop(request)

    def preempt(self, request):
        self.stop(request)
        self.wait(request)

    def step(self, tokens, keys):
        self.clock += 1
