"""The pages of running sequences: found in the cache or taken as they compute, passed on as they fill, given back when they stop."""

from __future__ import annotations

from collections.abc import Iterable

from jaxinfer.engine.beams import has_source, owns_page
from jaxinfer.engine.sequence import Sequence, common_length
from jaxinfer.kvcache.cache import PageCache
from jaxinfer.kvcache.prefix import Node
from jaxinfer.models.config import RopeConfig


class SequencePages:
    """Keeps page tables of sequences and the cache in step."""

    def __init__(self, cache: PageCache, rope: RopeConfig):
        self.cache = cache
        self._rope = rope

    def match(self, sequence: Sequence) -> list[Node]:
        """The cached pages that it may begin with."""
        if sequence.request.score:
            return []
        return self.cache.match(sequence.tokens[: sequence.dense_tokens + 1], sequence.namespace)

    def begin(self, sequence: Sequence, path: list[Node]) -> None:
        """It starts with the pages of `path`."""
        sequence.pages = self.cache.acquire(path)
        sequence.nodes = list(path)
        sequence.tail = path[-1] if path else self.root(sequence)
        sequence.published = len(path)
        sequence.computed = len(path) * self.cache.page_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed

    def root(self, sequence: Sequence) -> Node:
        return self.cache.tree.root(sequence.namespace)

    def has_begun(self, sequence: Sequence) -> bool:
        """Whether it has the pages that it begins with; a beam that starts again has to wait for those of another."""
        return has_source(sequence, self.cache)

    def is_being_computed(self, sequence: Sequence, found: int, running: Iterable[Sequence]) -> bool:
        """Whether a running prefill is about to compute the page after the `found` cached ones, so that waiting saves work."""
        end = (found + 1) * self.cache.page_size
        if sequence.request.score or not self.cache.sharing or end >= sequence.planned:
            return False
        for other in running:
            if other.decoding or other.request.score or other.namespace != sequence.namespace:
                continue
            theirs = other.tokens[: min(other.prompt_length, other.dense_tokens)]
            common = common_length(sequence.tokens[:-1][: sequence.dense_tokens], theirs)
            if other.computed < end <= common:
                sequence.awaited = other
                sequence.awaited_tokens = common // self.cache.page_size * self.cache.page_size
                return True
        return False

    def to_come(self, sequence: Sequence) -> int:
        """Pages that its known tokens and the next will need beside those that it has."""
        there = len(sequence.pages) or sequence.source_tokens // self.cache.page_size
        return max(self._count(sequence.planned + 1) - there, 0)

    def has(self, count: int, path: list[Node]) -> bool:
        """Whether there are so many pages beside those of `path`."""
        return count <= self.cache.available - self.cache.count_idle(path)

    def reserve(self, sequence: Sequence, count: int) -> bool:
        """Make sure that its next `count` tokens have pages."""
        missing = self._count(sequence.computed + count) - len(sequence.pages)
        if missing <= 0:
            return sequence.beams is None or owns_page(sequence, self.cache)
        pages = self.cache.allocate(missing)
        if pages is None:
            return False
        sequence.pages += pages
        return True

    def publish(self, sequence: Sequence, computed: int) -> None:
        """Share the full pages among its first `computed` tokens."""
        if not self.cache.sharing or sequence.tail is None:
            return
        if self._rope.kind == "dynamic" and sequence.namespace != 0:
            computed = min(
                computed, sequence.prompt_length
            )  # answers were rotated by other bases than prompts are
        computed = min(computed, sequence.dense_tokens)
        size = self.cache.page_size
        while (sequence.published + 1) * size <= computed:
            index = sequence.published
            key = sequence.tokens[index * size : (index + 1) * size].tobytes()
            node = self.cache.publish(sequence.tail, key, sequence.pages[index])
            if node.page != sequence.pages[index]:
                sequence.tail = (
                    None  # someone else's page: it may be evicted, so nothing of ours hangs below it
                )
                return
            sequence.tail = node
            sequence.nodes.append(node)
            sequence.published += 1

    def give_back(self, sequence: Sequence) -> None:
        """It stops; what it computed stays cached."""
        self.publish(sequence, min(sequence.computed, sequence.known))
        self.cache.release(sequence.pages, sequence.nodes)
        sequence.pages, sequence.nodes = [], []

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.cache.page_size)
