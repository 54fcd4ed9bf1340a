"""Who of those that wait starts next, how much prompt a step takes, and who gives way: what a schedule policy decides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from jaxinfer.engine.sequence import Sequence
from jaxinfer.kvcache.cache import PageCache

_LOOKED_AT = 64  # waiting sequences whose prefixes are compared


class Admission(Protocol):
    """The sequences that wait. Its length is their number."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...

    def hungry(self, window: int) -> bool:
        """Whether more requests should be read; `window` sequences may wait."""

    def add(self, sequence: Sequence) -> None:
        """A request has come."""

    def next(self) -> Sequence | None:
        """Take the one out that is to start; None if none should now."""

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """In their order to the front again: they could not start."""

    def preempted(self, sequence: Sequence) -> None:
        """It lost its place and waits again, before all others."""

    def started(self, sequence: Sequence) -> None: ...

    def finished(self, sequence: Sequence) -> None: ...

    def prefill_budget(self, decoding: int, keys: int, room: int) -> int:
        """Most prompt tokens of a step in which `decoding` sequences read `keys` tokens; the step has room for `room`."""

    def victim(self, running: list[Sequence]) -> Sequence:
        """Which of those that run, oldest first, gives its pages up."""

    def booked(self, steps: int, tokens: int, keys: int) -> None:
        """A call was planned: `tokens` through the model in `steps` steps that read `keys` keys while decoding."""

    def clear(self) -> None: ...


class Fifo:
    """In the order in which they come, every step as full as it can be."""

    def __init__(self):
        self._waiting: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def hungry(self, window: int) -> bool:
        return len(self) < window

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def next(self) -> Sequence | None:
        return self._waiting.popleft() if self._waiting else None

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        self._waiting.extendleft(reversed(list(sequences)))

    def preempted(self, sequence: Sequence) -> None:
        self._waiting.appendleft(sequence)

    def started(self, sequence: Sequence) -> None:
        pass

    def finished(self, sequence: Sequence) -> None:
        pass

    def prefill_budget(self, decoding: int, keys: int, room: int) -> int:
        return room

    def victim(self, running: list[Sequence]) -> Sequence:
        return running[-1]

    def booked(self, steps: int, tokens: int, keys: int) -> None:
        pass

    def clear(self) -> None:
        self._waiting.clear()


class LongestPrefix(Fifo):
    """Of the first that wait, the one with the longest prefix in the cache; preempted ones before all."""

    def __init__(self, cache: Callable[[], PageCache]):
        super().__init__()
        self._cache = cache
        self._first: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._first) + len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._first
        yield from self._waiting

    def next(self) -> Sequence | None:
        if self._first:
            return self._first.popleft()
        if not self._waiting:
            return None
        ahead = range(min(_LOOKED_AT, len(self._waiting)))
        best = max(ahead, key=lambda place: (self._cached(self._waiting[place]), -place))
        sequence = self._waiting[best]
        del self._waiting[best]
        return sequence

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        self._first.extendleft(reversed(list(sequences)))

    def preempted(self, sequence: Sequence) -> None:
        self._first.appendleft(sequence)

    def clear(self) -> None:
        self._first.clear()
        super().clear()

    def _cached(self, sequence: Sequence) -> int:
        """Tokens of its prefix that are in the cache, without counting as a use of them."""
        cache = self._cache()
        node, size = cache.tree.root(sequence.namespace), 0
        for key in cache.keys(sequence.tokens):
            child = node.children.get(key)
            if child is None:
                break
            node, size = child, size + 1
        return size * cache.page_size
