"""Expected lengths of answers, by what other answers of the same subtree had.

BlendServe (arXiv 2411.16102, section 5.1) runs 1 % of a batch first and takes the mean of a request's subtree, or of the smallest
one around it in which an answer is known. Here the mean square comes with it, because memory time grows with it, and a scanner
may go on learning (see `blend.BlendScanner`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxinfer.schedule.tree import RequestTree

_PRIOR_SHARE = 0.5  # of its limit that an answer is expected to use before any is known
_FEWEST = 8  # known answers of a subtree before its own mean is better than its parent's


class Expected(NamedTuple):
    """Attributes:
    length, square: float64 [requests], expected tokens of the answer, and expected square.
    group: int64 [requests], requests with the same expectation; -1 where the length is given.
    weight: float64 [groups], answers that the expectation stands on.
    """

    length: np.ndarray
    square: np.ndarray
    group: np.ndarray
    weight: np.ndarray

    @classmethod
    def exact(cls, outputs: np.ndarray) -> Expected:
        length = np.asarray(outputs, float)
        return cls(length, length * length, np.full(len(length), -1), np.zeros(0))


def sample(open_: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """Requests to run first: each of those with `open_` lengths (bool [requests]) with probability `share`."""
    return np.flatnonzero(open_ & (np.random.default_rng(seed).random(len(open_)) < share))


def expect(
    tree: RequestTree,
    least: np.ndarray,
    most: np.ndarray,
    seen: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    *,
    fewest: int = _FEWEST,
) -> Expected:
    """Args:
    least, most: int64 [requests], limits of each answer; where they are equal the length is given.
    seen, lengths: requests whose answers are known by now, and how long they were.
    fewest: known answers that a subtree needs before it speaks for itself; 1 is the paper's rule.
    """
    given = np.asarray(least) >= np.asarray(most)
    seen = np.zeros(0, np.int64) if seen is None else np.asarray(seen)
    known = np.zeros(0) if lengths is None else np.asarray(lengths, float)
    columns = np.zeros((3, len(tree.order)))
    columns[:, seen] = np.stack([np.ones(len(seen)), known, known * known])
    count, total, squares = (tree.below(column) for column in columns)
    speaker = np.arange(len(count))
    for node in range(1, len(count)):
        if count[node] < fewest:
            speaker[node] = speaker[tree.parent[node]]
    nodes, group = np.unique(speaker[tree.attach], return_inverse=True)
    if count[0] == 0:
        limits = np.where(given, 0, most) * _PRIOR_SHARE
        mean = np.bincount(group, limits, len(nodes)) / np.maximum(np.bincount(group, ~given, len(nodes)), 1)
        square, weight = 2 * mean * mean, np.ones(len(nodes))
    else:
        mean, square, weight = total[nodes] / count[nodes], squares[nodes] / count[nodes], count[nodes]
    mine = np.where(given, most, np.clip(mean[group], np.maximum(least, 1), np.maximum(most, 1)))
    length = mine.astype(float)
    return Expected(
        length,
        np.where(given, length * length, np.maximum(square[group], length * length)),
        np.where(given, -1, group),
        weight.astype(float),
    )
