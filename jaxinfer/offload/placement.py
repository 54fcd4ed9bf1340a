"""Which experts live on the device: by how often a calibration text visits them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from jaxinfer.errors import ConfigError


def by_popularity(counts: np.ndarray, slots: int) -> np.ndarray:
    """The most visited experts of all layers together, as Fiddler places them (section 3.4); ties go to the first.

    counts: [L, E] visits of the calibration text; returns bool [L, E] with min(slots, L * E) True.
    """
    order = np.argsort(-counts, axis=None, kind="stable")[:slots]
    resident = np.zeros(counts.shape, bool)
    resident.flat[order] = True
    return resident


def by_layer(counts: np.ndarray, slots: int) -> np.ndarray:
    """As many experts of every layer as of any other, one more for some: each layer's most visited ones.

    A step waits for each layer in turn, so a layer without residents is as slow as all the others are fast. The layers
    that get one more are those whose next expert is visited most. Shapes as of `by_popularity`.
    """
    layers, experts = counts.shape
    order = np.argsort(-counts, axis=1, kind="stable")
    each = min(slots // layers, experts)
    resident = np.zeros(counts.shape, bool)
    np.put_along_axis(resident, order[:, :each], True, axis=1)
    left = min(slots, layers * experts) - each * layers
    if left:
        following = order[:, each]
        gains = counts[np.arange(layers), following]
        for layer in np.argsort(-gains, kind="stable")[:left]:
            resident[layer, following[layer]] = True
    return resident


def by_whole_layers(counts: np.ndarray, slots: int) -> np.ndarray:
    """The first layers wholly, the others not at all, as llama.cpp splits a model. Shapes as of `by_popularity`."""
    resident = np.zeros(counts.shape, bool)
    resident[: slots // counts.shape[1]] = True
    return resident


PLACEMENTS: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = MappingProxyType(
    {"popularity": by_popularity, "by_layer": by_layer, "whole_layers": by_whole_layers}
)


def hit_rate(counts: np.ndarray, resident: np.ndarray) -> float:
    """Share of the visits that find their expert on the device; both [L, E]."""
    return float(counts[resident].sum() / counts.sum())


def read_popularity(
    path: str | Path, layers: int, experts: int, *, within: tuple[str, ...] = ()
) -> np.ndarray:
    """How often every expert is visited, from a JSON file: float64 [L, E].

    The file holds {"counts": [[...], ...]}, a row for each layer with experts, or objects that hold such counts at any
    depth, one for each text, as Fiddler's authors publish theirs. Every text weighs the same, however long it is: the
    result is the mean of the texts' shares, times L.

    Args:
      within: keys that lead to the part of the file to read; () is all of it.

    Raises:
      ConfigError: no such file or part, no counts in it, or counts of another model.
    """
    origin = f"offload.popularity = {str(path)!r}"
    try:
        data = json.loads(Path(path).read_bytes())
        for key in within:
            data = data[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{origin}: cannot be read: {type(error).__name__}: {error}") from None
    shares = [_shares(rows, layers, experts, origin) for rows in _counts(data)]
    if not shares:
        raise ConfigError(f'{origin}: has no "counts"; expected a row for each layer with experts')
    return np.mean(shares, axis=0)


def _shares(rows: object, layers: int, experts: int, origin: str) -> np.ndarray:
    try:
        counts = np.asarray(rows, np.float64)
    except (ValueError, TypeError):
        counts = np.zeros(0)
    if counts.shape != (layers, experts) or not (
        np.isfinite(counts).all() and counts.min() >= 0 < counts.max()
    ):
        raise ConfigError(
            f"{origin}: counts of shape {list(counts.shape)}; this model needs numbers of at least 0, not all 0, "
            f"{layers} rows (layers with experts) of {experts} (experts)"
        )
    return counts * layers / counts.sum()


def _counts(data: object) -> Iterator[object]:
    if isinstance(data, Mapping):
        if "counts" in data:
            yield data["counts"]
        else:
            for value in data.values():
                yield from _counts(value)
