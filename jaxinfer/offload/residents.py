"""Which expert lies in which slot of the device's pool, and whether the running work wants another one there."""

from __future__ import annotations

from collections import deque

import numpy as np

_DECAY = 0.98  # of a layer's scores at each visit: a visit is forgotten by half in 34 steps
_MARGIN = 2.0  # a newcomer must be wanted so much more than whom it replaces, or the two would take turns


class Residents:
    """The slot table. Residents stay until the workload wants others; a landing slot's expert until another one lands.

    Attributes:
      count: slots.
      slot_of: int32 [L, E], the slot of each expert; -1 where it is not on the device.
      landing: slots in the order in which they are filled next.
      scores: float64 [L, E], visits that fade with time; the placement's popularity to begin with.
    """

    def __init__(self, resident: np.ndarray, landing: int, popularity: np.ndarray | None = None):
        self._first = [(int(row), int(expert)) for row, expert in np.argwhere(resident)]
        self.count = len(self._first) + landing
        self.slot_of = np.full(resident.shape, -1, np.int32)
        self._holds: dict[int, tuple[int, int]] = {}
        self.landing: deque[int] = deque()
        self.begin()
        self.scores = np.zeros(resident.shape)
        if popularity is not None and popularity.sum() > 0:
            # as much weight as some thirty steps that visit two experts of each layer
            self.scores += popularity / popularity.sum(axis=1, keepdims=True).clip(1e-9) * 2 / (1 - _DECAY)

    def begin(self) -> list[tuple[int, int]]:
        """The residents of the beginning, in the order of their slots: what has to lie there now. Scores stay."""
        self.slot_of[:] = -1
        self._holds.clear()
        for slot, place in enumerate(self._first):
            self._settle(place, slot)
        self.landing = deque(range(len(self._first), self.count))
        return self._first

    def of_layer(self, layer: int) -> np.ndarray:
        """bool [E]"""
        return self.slot_of[layer] >= 0

    def slots(self, layer: int, ids: np.ndarray) -> np.ndarray:
        """The slot of each; -1 where the expert is not here, or the id is negative."""
        return np.where(ids >= 0, self.slot_of[layer, ids], -1)

    def stays(self, layer: int, expert: int) -> bool:
        """Whether it is a resident."""
        slot = int(self.slot_of[layer, expert])
        return slot >= 0 and slot not in self.landing

    def visit(self, layer: int, tokens: np.ndarray) -> None:
        """A step asked for the layer's experts: int [E] visits."""
        self.scores[layer] *= _DECAY
        self.scores[layer] += np.minimum(tokens, 1)

    def bring(self, layer: int, expert: int) -> int:
        """The landing slot where it lies from now on; what lay there is gone."""
        slot = self.landing[0]
        self.landing.rotate(-1)
        if slot in self._holds:
            self.slot_of[self._holds[slot]] = -1
        self._settle((layer, expert), slot)
        return slot

    def victim(self, layer: int, expert: int) -> tuple[int, int] | None:
        """The resident of any layer that the workload wants least, if it wants this expert clearly more."""
        held = np.where(self.slot_of >= 0, self.scores, np.inf)
        for slot in self.landing:
            if slot in self._holds:
                held[self._holds[slot]] = np.inf
        place = np.unravel_index(np.argmin(held), held.shape)
        worth = self.scores[layer, expert] > _MARGIN * held[place] + 1
        return (int(place[0]), int(place[1])) if worth else None

    def keep(self, layer: int, expert: int, victim: tuple[int, int]) -> None:
        """The expert in a landing slot stays; the victim's becomes a landing slot, the last to be filled."""
        self.landing.remove(int(self.slot_of[layer, expert]))
        self.landing.append(int(self.slot_of[victim]))

    def _settle(self, place: tuple[int, int], slot: int) -> None:
        self.slot_of[place] = slot
        self._holds[slot] = place

    def check_integrity(self) -> None:
        """Assert that a slot holds one expert at most, that all residents' do, and that landing slots differ."""
        assert {place: slot for slot, place in self._holds.items()} == {
            (int(a), int(b)): int(self.slot_of[a, b]) for a, b in np.argwhere(self.slot_of >= 0)
        }
        landing = set(self.landing)
        assert len(landing) == len(self.landing) and landing | set(self._holds) == set(range(self.count))
