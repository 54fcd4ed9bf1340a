"""The page cache against a model that keeps sets of pages per prefix."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxinfer.kvcache.cache import PageCache

PAGE = 4


def prompt(*pages: int, tail: int = 1) -> np.ndarray:
    """A prompt whose pages are filled by the given numbers, and `tail` tokens more."""
    return np.concatenate([np.full(PAGE, p, np.int32) for p in pages] + [np.full(tail, 99, np.int32)])


def put(cache: PageCache, tokens: np.ndarray):
    """Compute a prompt the way the planner does: match, allocate, publish. Returns (pages, nodes)."""
    path = cache.match(tokens)
    pages = cache.acquire(path)
    fresh = cache.allocate(-(-len(tokens) // PAGE) - len(pages))
    assert fresh is not None
    pages, nodes = pages + fresh, list(path)
    tail = path[-1] if path else cache.tree.root()
    for index, key in list(enumerate(cache.keys(tokens)))[len(path) :]:
        tail = cache.publish(tail, key, pages[index])
        if tail.page == pages[index]:
            nodes.append(tail)
    return pages, nodes


def test_a_shared_prefix_is_held_once():
    cache = PageCache(32, PAGE)
    first, _ = put(cache, prompt(1, 2, 3))
    second, _ = put(cache, prompt(1, 2, 4))
    assert first[:2] == second[:2] and first[2] != second[2]
    assert cache.used == 6  # two shared, one each, and a last partial page each
    cache.check_integrity([first, second])


def test_partial_pages_and_the_last_token_are_never_matched():
    cache = PageCache(32, PAGE)
    put(cache, prompt(1, 2))
    assert len(cache.match(prompt(1, 2, tail=1))) == 2
    assert (
        len(cache.match(prompt(1, 2, tail=1)[:-1])) == 1
    )  # the page that holds the last token must be computed
    assert len(cache.match(prompt(1, 2)[:6])) == 1


def test_namespaces_are_apart():
    cache = PageCache(32, PAGE)
    put(cache, prompt(1, 2))
    assert cache.match(prompt(1, 2), namespace=1) == []


def test_without_sharing_nothing_is_matched():
    cache = PageCache(32, PAGE, sharing=False)
    put(cache, prompt(1, 2))
    assert cache.match(prompt(1, 2)) == []


def test_the_least_recently_used_leaf_goes_first():
    cache = PageCache(8, PAGE)  # 7 pages to use
    for number in (1, 2, 3):
        cache.release(*put(cache, prompt(number)))
    assert cache.used == 3 and cache.available == 7
    cache.match(prompt(1))  # 2 is now the oldest
    taken = cache.allocate(5)
    assert taken is not None
    assert [len(cache.match(prompt(number))) for number in (1, 2, 3)] == [1, 0, 1]
    cache.check_integrity([taken])


def test_the_book_of_leaves_does_not_grow_with_use():
    cache = PageCache(8, PAGE)
    for _ in range(1000):
        cache.release(*put(cache, prompt(1, 2)))
    assert len(cache.tree._leaves) <= cache.tree.nodes
    assert cache.allocate(7) is not None and cache.tree.nodes == 0


def test_pages_in_use_are_never_evicted():
    cache = PageCache(5, PAGE)
    pages, nodes = put(cache, prompt(1, 2))
    assert cache.allocate(2) is None
    cache.release(pages, nodes)
    assert cache.allocate(4) is not None


def test_a_lost_page_is_noticed():
    cache = PageCache(8, PAGE)
    pages, _ = put(cache, prompt(1))
    with pytest.raises(AssertionError, match="owner"):
        cache.check_integrity([])
    cache.check_integrity([pages])


class CacheMachine(RuleBasedStateMachine):
    """Random sequences come and go; contents of pages are checked against the tokens they were written for."""

    def __init__(self):
        super().__init__()
        self.cache = PageCache(24, PAGE)
        self.live = []
        self.content = {}

    @rule(pages=st.lists(st.integers(1, 3), min_size=1, max_size=5), tail=st.integers(1, PAGE))
    def arrive(self, pages, tail):
        tokens = prompt(*pages, tail=tail)
        path = self.cache.match(tokens)
        for depth, node in enumerate(path):
            assert self.content[node.page] == tokens[: (depth + 1) * PAGE].tobytes()
        needed = -(-len(tokens) // PAGE) - len(path)
        if needed > self.cache.available - self.cache.count_idle(path):
            return
        held, nodes = put(self.cache, tokens)
        for index, page in enumerate(held[: len(tokens) // PAGE]):
            self.content[page] = tokens[: (index + 1) * PAGE].tobytes()
        self.live.append((held, nodes))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data):
        self.cache.release(*self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    @rule()
    def forget(self):
        self.cache.forget()
        assert self.cache.available == self.cache.allocator.free

    @invariant()
    def whole(self):
        self.cache.check_integrity([pages for pages, _ in self.live])
        assert self.cache.used <= 23


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
