"""Which pages of the pool are free, and how many owners each used page has."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PADDING_PAGE = 0


class PageAllocator:
    """Reference-counted pages 1..pages-1 of a pool; page 0 is the padding page and never handed out."""

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages - 1, PADDING_PAGE, -1))
        self._owners = np.zeros(pages, np.int32)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Pages that can be in use at once."""
        return self.pages - 1

    def take(self, count: int) -> list[int]:
        """Hand out `count` free pages with one owner each; the caller has checked `free`."""
        assert count <= len(self._free)
        taken = [self._free.pop() for _ in range(count)]
        self._owners[taken] = 1
        return taken

    def share(self, page: int) -> None:
        """Add an owner to a used page."""
        assert self._owners[page] > 0
        self._owners[page] += 1

    def release(self, page: int) -> int:
        """Drop one owner and return how many are left; at zero the page is free again."""
        assert self._owners[page] > 0
        self._owners[page] -= 1
        left = int(self._owners[page])
        if left == 0:
            self._free.append(page)
        return left

    def owners(self, page: int) -> int:
        return int(self._owners[page])

    def check_integrity(self, references: Iterable[int]) -> None:
        """Assert that `references`, one entry per owner and page, is exactly what the counts say."""
        counted = np.bincount(np.fromiter(references, np.int64), minlength=self.pages)
        wrong = np.flatnonzero(counted != self._owners)
        assert wrong.size == 0, f"pages {wrong[:8].tolist()} have other owner counts than references"
        free = set(self._free)
        assert len(free) == len(self._free) and PADDING_PAGE not in free, "a page is free twice"
        assert free == set(np.flatnonzero(self._owners[1:] == 0) + 1), "a page is lost or free while owned"
