"""A radix tree over full pages of tokens: which prefixes have their keys and values in the pool already."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator


class Node:
    """One full page of tokens after the path of its parents. The tree owns one reference to its page."""

    __slots__ = ("children", "key", "last_use", "offered", "page", "parent")

    def __init__(self, key: bytes | int, parent: Node | None, page: int):
        self.key = key
        self.parent = parent
        self.page = page
        self.children: dict[bytes, Node] = {}
        self.last_use = 0
        self.offered = False


class PrefixTree:
    """Nodes are reached by the bytes of their page's int32 token ids.

    A namespace keeps apart sequences whose keys differ for the same tokens (rotary scaling by length).
    Least recently used leaves are offered for eviction first.
    """

    def __init__(self):
        self._roots: dict[int, Node] = {}
        self._clock = itertools.count(1)
        self._order = itertools.count()
        self._leaves: list[tuple[int, int, Node]] = []
        self.nodes = 0

    def root(self, namespace: int = 0) -> Node:
        if namespace not in self._roots:
            self._roots[namespace] = Node(namespace, None, -1)
        return self._roots[namespace]

    def match(self, keys: Iterable[bytes], namespace: int = 0) -> list[Node]:
        """The longest path of nodes that follows `keys`, root excluded."""
        node, path = self.root(namespace), []
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        self._touch(path)
        return path

    def extend(self, parent: Node, key: bytes, page: int) -> tuple[Node, bool]:
        """The child of `parent` for `key`, and whether it is new (then it has taken `page`)."""
        child = parent.children.get(key)
        if child is not None:
            return child, False
        child = Node(key, parent, page)
        parent.children[key] = child
        self.nodes += 1
        self._touch([child])
        return child, True

    def offer(self, node: Node) -> None:
        """Remember that nobody but the tree uses `node`: it may be evicted once it is a leaf."""
        if not node.children and not node.offered:
            node.offered = True
            heapq.heappush(self._leaves, (node.last_use, next(self._order), node))

    def evict(self, may_go: Callable[[Node], bool]) -> Node | None:
        """Remove the least recently used leaf for which `may_go(node)`, and return it."""
        while self._leaves:
            last_use, _, node = heapq.heappop(self._leaves)
            node.offered = False
            if node.children or node.parent is None or not may_go(node):
                continue  # offered again when its last child or its last user goes
            if last_use != node.last_use:
                self.offer(node)
                continue
            self._remove(node)
            return node
        return None

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None and isinstance(node.key, bytes)
        del parent.children[node.key]
        node.parent = None
        self.nodes -= 1
        if parent.parent is not None:
            self.offer(parent)

    def _touch(self, path: list[Node]) -> None:
        now = next(self._clock)
        for node in path:
            node.last_use = now

    def __iter__(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node
