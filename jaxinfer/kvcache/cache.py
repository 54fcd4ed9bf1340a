"""Pages for sequences: allocation, sharing of prefixes, eviction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from jaxinfer.kvcache.allocator import PageAllocator
from jaxinfer.kvcache.prefix import Node, PrefixTree


class PageCache:
    """The host's book of the KV pool.

    Only full pages are shared, so a shared page is never written again. A page may enter the tree as soon as the
    step that writes it has been planned: the device runs steps in order, and inside a step every layer
    writes its keys before anything attends to them.
    """

    def __init__(self, pages: int, page_size: int, *, sharing: bool = True):
        self.page_size = page_size
        self.sharing = sharing
        self.allocator = PageAllocator(pages)
        self.tree = PrefixTree()
        self._idle = 0  # tree nodes that no sequence uses

    @property
    def used(self) -> int:
        return self.allocator.capacity - self.allocator.free

    @property
    def capacity(self) -> int:
        return self.allocator.capacity

    @property
    def held(self) -> int:
        """Pages that sequences own; the other used ones are idle prefixes, kept for requests to come."""
        return self.used - self._idle

    @property
    def available(self) -> int:
        """Pages that are free or held by the tree alone (an upper bound: an unused page may sit above a used one)."""
        return self.allocator.free + self._idle

    def count_idle(self, nodes: Iterable[Node]) -> int:
        """How many of `nodes` no sequence uses."""
        return sum(self.allocator.owners(node.page) == 1 for node in nodes)

    def keys(self, tokens: np.ndarray) -> Iterator[bytes]:
        """Tree keys of the full pages of `tokens` (int32)."""
        size = self.page_size
        for start in range(0, len(tokens) - size + 1, size):
            yield tokens[start : start + size].tobytes()

    def match(self, tokens: np.ndarray, namespace: int = 0) -> list[Node]:
        """Nodes of the longest cached prefix of `tokens` that leaves at least one token to compute."""
        if not self.sharing:
            return []
        return self.tree.match(self.keys(tokens[: len(tokens) - 1]), namespace)

    def acquire(self, nodes: Iterable[Node]) -> list[int]:
        """Take part in the ownership of matched pages."""
        pages = [node.page for node in nodes]
        for page in pages:
            if self.allocator.owners(page) == 1:
                self._idle -= 1
            self.allocator.share(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Take part in the ownership of pages that another sequence has."""
        for page in pages:
            self.allocator.share(page)

    def is_shared(self, page: int) -> bool:
        return self.allocator.owners(page) > 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages of one's own, evicting idle prefixes if need be; None if there are not that many."""
        if count > self.available:
            return None
        while self.allocator.free < count:
            if not self._evict():
                return None
        return self.allocator.take(count)

    def forget(self) -> None:
        """Evict every prefix that no sequence uses."""
        while self._evict():
            pass

    def _evict(self) -> bool:
        node = self.tree.evict(lambda node: self.allocator.owners(node.page) == 1)
        if node is not None:
            self._idle -= 1
            self.allocator.release(node.page)
        return node is not None

    def publish(self, parent: Node, key: bytes, page: int) -> Node:
        """Offer a sequence's own full page to others. Someone else's equal page stays the shared one."""
        node, new = self.tree.extend(parent, key, page)
        if new:
            self.allocator.share(page)
        return node

    def release(self, pages: Iterable[int], nodes: Iterable[Node] = ()) -> None:
        """Give up `pages`; `nodes` are the tree nodes among them, which become idle when nobody else uses them."""
        for page in pages:
            self.allocator.release(page)
        for node in nodes:
            if node.parent is not None and self.allocator.owners(node.page) == 1:
                self._idle += 1
                self.tree.offer(node)

    def check_integrity(self, sequences: Iterable[Iterable[int]] = ()) -> None:
        """Assert that every page is free or owned by exactly the given sequences' page lists and the tree."""
        nodes = list(self.tree)
        assert len(nodes) == self.tree.nodes
        owned = [page for pages in sequences for page in pages]
        self.allocator.check_integrity(owned + [node.page for node in nodes])
        idle = self.count_idle(nodes)
        assert idle == self._idle, f"{idle} idle pages, {self._idle} counted"
