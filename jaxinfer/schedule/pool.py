"""The KV pool of a simulation: tokens that requests hold, and prefixes that stay cached while there is room."""

from __future__ import annotations

import numpy as np


class SimulatedPool:
    """Prefixes are the nodes of a `RequestTree`. Idle ones form a list, least recently used first, children before parents.

    Args:
      own, parent: int64 [nodes].
      attach, alone: int64 [requests].
      capacity: tokens.

    Attributes:
      used: tokens held by requests and cached prefixes.
      idle: tokens of those prefixes that no request uses.
    """

    def __init__(self, own, parent, attach, alone, capacity):
        nodes = len(own)
        self.own, self.parent, self.attach, self.alone = own, parent, attach, alone
        self.capacity = capacity
        self.used = 0
        self.idle = 0
        self.users = np.zeros(nodes, np.int64)
        self.cached = np.zeros(nodes, np.bool_)
        self.before = np.full(nodes + 1, nodes, np.int64)  # the list of idle nodes; `nodes` is its head
        self.after = np.full(nodes + 1, nodes, np.int64)

    @property
    def free(self):
        """Tokens that a request could get."""
        return self.capacity - self.used + self.idle

    def missing(self, request):
        """Tokens of its prefix that are not cached, and how many cached ones of it are idle."""
        node = self.attach[request]
        missing = idle = 0
        while node > 0:
            if not self.cached[node]:
                missing += self.own[node]
            elif self.users[node] == 0:
                idle += self.own[node]
            node = self.parent[node]
        return missing, idle

    def enter(self, request, generated):
        """Take room for the request's own known tokens and for its prefix; returns tokens of the prefix to compute."""
        computed = 0
        node = self.attach[request]
        while node > 0:
            if not self.cached[node]:
                self.cached[node] = True
                self.used += self.own[node]
                computed += self.own[node]
            elif self.users[node] == 0:
                self.unlink(node)
            self.users[node] += 1
            node = self.parent[node]
        self.used += self.alone[request] + generated
        return computed

    def leave(self, request, generated):
        """Give up the request's own tokens; its prefix stays."""
        self.used -= self.alone[request] + generated
        node = self.attach[request]
        while node > 0:
            self.users[node] -= 1
            if self.users[node] == 0:
                self.link(node)
            node = self.parent[node]

    def shrink(self):
        """Forget idle prefixes until no more is used than there is; False if that is not enough."""
        head = len(self.own)
        while self.used > self.capacity and self.after[head] != head:
            node = self.after[head]
            self.unlink(node)
            self.cached[node] = False
            self.used -= self.own[node]
        return self.used <= self.capacity

    def link(self, node):
        head = len(self.own)
        last = self.before[head]
        self.after[last], self.before[node] = node, last
        self.after[node], self.before[head] = head, node
        self.idle += self.own[node]

    def unlink(self, node):
        before, after = self.before[node], self.after[node]
        self.after[before], self.before[after] = after, before
        self.idle -= self.own[node]
