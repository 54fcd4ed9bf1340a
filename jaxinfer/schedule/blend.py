"""Our dual scanner: compute is spent in proportion to the memory time of each step, so that both kinds of work end together.

Beside the paper's scanner (see `scanner.py`, whose words it speaks): the steps' own demand steers rather than static shares;
memory-heavy requests start longest first, as many as the pool will hold at its expected peak; weights that a step reads
anyway are used for as many tokens as they are good for; lengths of answers are learned while they come.
"""

from __future__ import annotations

import numpy as np

from jaxinfer.schedule.scanner import LEFT, RIGHT

_PATIENCE = 32  # steps after which a full pool is looked at again
_PUSH = 0.5  # an empty pool takes so much more prompt than balance asks for, lest it stay empty


class BlendScanner:
    """See `FixedOrder` for the methods.

    Args:
      order: int64 [requests] of a `Plan`.
      density: float64 [requests], of each one's unit.
      root: density of the batch.
      prompt, alone: int64 [requests], prompt tokens, and those of them that no other request has.
      shared: prompt tokens that several requests have, each once.
      length, square: float64 [requests], expected answer and its square.
      group: int64 [requests], which have the same expectation and teach each other; -1 for a known length.
      weight: float64 [groups], how many answers their expectation is worth before any is seen here.
      token_seconds, key_seconds, step_seconds: of a `Cost`.
      capacity: tokens of the KV pool.
      slots: most requests that run at once.
      max_tokens: of a step.
      quantum: steps are filled up to a multiple of so many tokens.
    """

    def __init__(
        self,
        order,
        density,
        root,
        prompt,
        alone,
        shared,
        length,
        square,
        group,
        weight,
        token_seconds,
        key_seconds,
        step_seconds,
        capacity,
        slots,
        max_tokens,
        quantum,
    ):
        self.order = order
        self.density = density
        self.root = root
        self.prompt = prompt
        self.alone = alone
        self.length = length
        self.group = group
        self.token_seconds = token_seconds
        self.key_seconds = key_seconds
        self.free_tokens = int(step_seconds / token_seconds)
        self.capacity = capacity
        self.slots = slots
        self.max_tokens = max_tokens
        self.quantum = quantum
        self.left = 0
        self.right = len(order) - 1
        self.clock = 0
        self.running = 0
        self.looked = -_PATIENCE  # when the pool was last found full
        self.heavy = np.zeros(64, np.int64)  # running requests of the right
        self.heavies = 0
        self.place = np.full(len(prompt), -1, np.int64)  # in `heavy`
        self.since = np.full(len(prompt), -1, np.int64)  # the step of its start
        self.light_held = 0.0
        self.holds = np.zeros(len(prompt))  # what each running request of the left adds to it
        self.expect(shared, square, weight)

    def expect(self, shared, square, weight):
        """Set up what is expected of every group and of the batch."""
        groups = len(weight)
        self.seen = weight.copy()
        self.sum = np.zeros(groups)
        self.sum_square = np.zeros(groups)
        self.open = np.zeros(groups)  # requests not finished
        self.open_prompt = np.zeros(groups)
        compute = float(shared)
        reads = steps = light_reads = light_steps = 0.0
        for request in self.order:
            mine, length = self.group[request], self.length[request]
            compute += self.alone[request] + length
            mine_reads = self.prompt[request] * length + square[request] / 2
            reads += mine_reads
            steps += length
            if self.density[request] >= self.root:
                light_reads += mine_reads
                light_steps += length
            if mine >= 0:
                self.open[mine] += 1
                self.open_prompt[mine] += self.prompt[request]
                self.sum[mine] = weight[mine] * length
                self.sum_square[mine] = weight[mine] * square[request]
        self.left_tokens = compute
        self.left_reads = reads
        # What the compute-heavy requests take of the pool and of the places, on average over the batch: the paper's formula
        # for the shares, with the densities of whole sides instead of those under the cursors.
        self.light_part = light_reads / max(reads, 1.0)
        self.light_rows = light_steps / max(steps, 1.0)

    def go_on(self, before, running):
        """Take over from a scanner of an earlier plan; `running` are requests that it has handed out and that are not finished."""
        self.clock, self.running, self.looked = before.clock, before.running, -_PATIENCE
        self.heavy, self.heavies, self.place = before.heavy, before.heavies, before.place
        self.since, self.holds, self.light_held = before.since, before.holds, before.light_held
        for request in running:
            mine, length = self.group[request], self.expected(request)
            if mine >= 0:
                self.open[mine] += 1
                self.open_prompt[mine] += self.prompt[request]
            age = self.clock - self.since[request] if self.since[request] >= 0 else 0
            rest = max(length - age, 0.0)
            self.left_tokens += rest
            self.left_reads += (self.prompt[request] + age) * rest + rest * rest / 2

    def expected(self, request):
        """Tokens of its answer, by what is known now."""
        mine = self.group[request]
        return self.length[request] if mine < 0 else self.sum[mine] / self.seen[mine]

    @property
    def balance(self):
        """Tokens to compute for each key read, over all that is left."""
        return max(self.left_tokens, 1.0) / max(self.left_reads, 1.0)

    def peek(self, side):
        if self.left > self.right:
            return -1
        return self.order[self.left if side == LEFT else self.right]

    def take(self, side):
        request = self.peek(side)
        if side == LEFT:
            self.left += 1
        else:
            self.right -= 1
        return request

    def wants(self, side, request):
        if self.running == 0:
            return True
        if side == RIGHT:
            return self.density[request] < self.root and self.has_room(request)
        holds = self.alone[request] + self.expected(request)
        return self.light_held + self.heavy_now() + holds <= self.capacity

    def has_room(self, request):
        """Whether the pool holds a memory-heavy request beside the others when all have grown, and the other side's share."""
        if self.clock - self.looked < _PATIENCE:
            return False
        spared = max(self.light_held, self.light_part * self.capacity)
        full = self.heavies + 1 > (1 - self.light_rows) * self.slots
        if self.heavies and (full or self.peak(request) + spared > self.capacity):
            self.looked = self.clock
            return False
        return True

    def heavy_now(self):
        held = 0.0
        for i in range(self.heavies):
            request = self.heavy[i]
            held += self.prompt[request] + self.clock - self.since[request]
        return held

    def peak(self, request):
        """Most tokens that the running memory-heavy requests and this one will hold at once, if none starts after them."""
        count = self.heavies + 1
        held, rest = np.zeros(count), np.zeros(count)
        for i in range(count):
            each = self.heavy[i] if i < self.heavies else request
            age = self.clock - self.since[each] if i < self.heavies else 0
            held[i] = self.prompt[each] + age
            rest[i] = max(self.expected(each) - age, age / 2)
        most = total = 0.0
        for number, longest in enumerate(np.argsort(-rest)):
            total += held[longest]
            most = max(most, total + (number + 1) * rest[longest])
        return most

    def prefill(self, decoding, keys):
        """As much compute as keeps the balance of all that is left, at least what the weights' reading leaves free."""
        total = self.balance * keys
        if self.heavies == 0:
            total *= 1 + _PUSH * (1 - min(keys / self.capacity, 1.0))
        total = min(max(total, float(self.free_tokens), 1.0), float(self.max_tokens))
        return max(max(int(total / self.quantum + 0.5), 1) * self.quantum - decoding, 0)

    def begin(self, request):
        """It waits no longer."""

    def start(self, request, side):
        self.begin(request)
        self.running += 1
        self.since[request] = self.clock
        if side == RIGHT:
            if self.heavies == len(self.heavy):
                self.heavy = np.append(self.heavy, np.zeros_like(self.heavy))
            self.heavy[self.heavies] = request
            self.place[request] = self.heavies
            self.heavies += 1
        else:
            self.holds[request] = self.alone[request] + self.expected(request)
            self.light_held += self.holds[request]

    def finish(self, request, generated):
        mine = self.group[request]
        self.stop(request)
        expected = self.expected(request)
        self.left_tokens += generated - expected
        self.left_reads += self.prompt[request] * (generated - expected)
        if mine < 0:
            self.left_reads += (generated * generated - expected * expected) / 2
            return
        square = self.sum_square[mine] / self.seen[mine]
        self.left_reads += (generated * generated - square) / 2
        self.open[mine] -= 1
        self.open_prompt[mine] -= self.prompt[request]
        self.seen[mine] += 1
        self.sum[mine] += generated
        self.sum_square[mine] += generated * generated
        more = self.expected(request) - expected
        self.left_tokens += self.open[mine] * more
        self.left_reads += self.open_prompt[mine] * more
        self.left_reads += self.open[mine] * (self.sum_square[mine] / self.seen[mine] - square) / 2

    def stop(self, request):
        """It runs no longer."""
        self.running -= 1
        self.looked = -_PATIENCE
        place = self.place[request]
        if place < 0:
            self.light_held = max(self.light_held - self.holds[request], 0.0)
            return
        self.heavies -= 1
        last = self.heavy[self.heavies]
        self.heavy[place] = last
        self.place[last] = place
        self.place[request] = -1

    def preempt(self, request):
        """What it had computed is to be computed again."""
        self.stop(request)
        self.left_tokens += self.prompt[request]

    def overdue(self, request, generated):
        """What it holds is looked at as it is, so nothing changes."""

    def step(self, tokens, keys):
        self.clock += 1
        self.left_tokens = max(self.left_tokens - tokens, 0.0)
        self.left_reads = max(self.left_reads - keys, 0.0)
