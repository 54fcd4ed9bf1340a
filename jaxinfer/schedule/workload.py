"""The shape of a whole batch, known before its first step: lengths, limits, and what its prompts share."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_ROWS_AT_ONCE = 1 << 16  # bounds what is mapped and gathered at a time, not what is planned
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """Columns over all requests, in the order they came. Some 20 bytes a request; the tokens may be a mapped file.

    Attributes:
      tokens: int32 [prompt tokens of all requests].
      starts: int64 [requests + 1], where each prompt begins in `tokens`.
      answer_limits: int64 [requests], most tokens to generate, all choices or beams of a request together.
      answer_floors: int64 [requests], fewest tokens, such as all of them where nothing but the limit ends an answer; None is none.
      answered: int64 [requests], tokens of answers that are there already, of all choices together; -1 where one is still to be
        given, and None where all are. Those requests are not served again, but tell how long the others' answers may be.
    """

    tokens: np.ndarray
    starts: np.ndarray
    answer_limits: np.ndarray
    answer_floors: np.ndarray | None = None
    answered: np.ndarray | None = None

    @property
    def known(self) -> np.ndarray:
        """int64 [requests], `answered` of each."""
        return np.full_like(self.answer_limits, -1) if self.answered is None else self.answered

    @property
    def least(self) -> np.ndarray:
        """int64 [requests], fewest tokens of each answer."""
        return np.zeros_like(self.answer_limits) if self.answer_floors is None else self.answer_floors

    @property
    def prompt_tokens(self) -> np.ndarray:
        """int64 [requests]."""
        return np.diff(self.starts)

    def prompt(self, index: int) -> np.ndarray:
        """int32 [prompt tokens of the request]."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sharing:
    """What the prompts of a workload have in common, by whole pages, as the engine's prefix tree would find it.

    Attributes:
      rank: int64 [requests], its place in depth-first order of the prefix tree; equal for prompts with the same pages.
      common: int64 [requests], whole pages that the request at each place of that order (ties in the order they came) has in
        common with the one before it; 0 at the first place.
      shared_tokens: prompt tokens whose keys need not be computed if nothing that is shared is ever evicted.
    """

    rank: np.ndarray
    common: np.ndarray
    shared_tokens: int

    @classmethod
    def none(cls, workload: Workload) -> Sharing:
        count = len(workload.answer_limits)
        return cls(rank=np.arange(count), common=np.zeros(count, np.int64), shared_tokens=0)

    @classmethod
    def of(cls, workload: Workload, page_size: int) -> Sharing:
        """Refines groups of equal prefixes page by page until every group is one request.

        The last token of a prompt is always computed, so only pages before it count. Pages are compared by 64-bit hashes.
        """
        pages = np.maximum(workload.prompt_tokens - 1, 0) // page_size
        rank = np.zeros(len(pages), np.int64)
        parted: list[
            tuple[np.ndarray, int]
        ] = []  # places whose request differs from the one before at a level
        active = np.arange(len(pages))
        distinct, level = 0, 0
        while len(active):
            hashes = _page_hashes(workload, active, level, page_size, pages)
            order = np.lexsort((hashes, rank[active]))
            active, hashes = active[order], hashes[order]
            parents = rank[active]
            family = _starts(parents[1:] != parents[:-1])
            group = _starts((parents[1:] != parents[:-1]) | (hashes[1:] != hashes[:-1]))
            size = np.diff(np.append(group, len(active)))
            first = np.repeat(group, size)
            of_parent = np.repeat(family, np.diff(np.append(family, len(active))))
            rank[active] = parents + first - of_parent
            parted.append(
                (np.setdiff1d(rank[active[group]], rank[active[family]], assume_unique=True), level)
            )
            goes_on, alone = hashes != 0, np.repeat(size, size) == 1
            distinct += int(np.count_nonzero(goes_on[group]))
            distinct += int(np.sum(pages[active[goes_on & alone]] - level - 1))
            active = active[goes_on & ~alone]
            level += 1
        common = pages[np.argsort(rank, kind="stable")]
        common[:1] = 0
        for places, level in parted:
            common[places] = level
        return cls(rank=rank, common=common, shared_tokens=(int(pages.sum()) - distinct) * page_size)


POLICIES: dict[str, Callable[[Sharing], np.ndarray]] = {
    "fcfs": lambda sharing: np.arange(len(sharing.rank)),
    "random": lambda sharing: np.random.default_rng(0).permutation(len(sharing.rank)),
    "longest-prefix": lambda sharing: np.arange(len(sharing.rank)),
    "dfs": lambda sharing: np.argsort(sharing.rank, kind="stable"),
}


def _starts(differs: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.concatenate(([True], differs)))


def _page_hashes(
    workload: Workload, rows: np.ndarray, level: int, page_size: int, pages: np.ndarray
) -> np.ndarray:
    """uint64 [rows]: of page `level` of each prompt; 0 where it has none."""
    hashes = np.zeros(len(rows), np.uint64)
    columns = np.arange(page_size)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        piece = rows[start : start + _ROWS_AT_ONCE]
        there = np.flatnonzero(pages[piece] > level)
        at = workload.starts[piece[there]] + level * page_size
        hashes[start + there] = _hash(workload.tokens[at[:, None] + columns])
        _let_go(workload.tokens)
    return hashes


def _hash(pages: np.ndarray) -> np.ndarray:
    """uint64 [rows], never 0, of int32 [rows, page_size]."""
    value = np.ones(len(pages), np.uint64)
    for column in pages.T:
        value = (value ^ column.astype(np.uint64)) * _MULTIPLIER
        value ^= value >> np.uint64(29)
    return np.maximum(value, np.uint64(1))


def _let_go(tokens: np.ndarray) -> None:
    """Mapped pages count as memory of the process until they are given back."""
    mapped = getattr(tokens, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
