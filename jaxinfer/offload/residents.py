"""Which expert lies in which slot of the device's pool, and whether the running work wants another one there."""

from __future__ import annotations

from collections import deque

import numpy as np

_DECAY = 0.98  # of a layer's scores at each visit: a visit is forgotten by half in 34 steps
_MARGIN = 2.0  # a newcomer must be wanted so much more than whom it replaces, or the two would take turns


class Residents:
    """The slot table: residents stay until the workload wants others; landing slots hold experts for one layer's work.

    Attributes:
      slot_of: int32 [L, E], the slot of each expert; -1 where it is not on the device.
      landing: slots that hold nothing to keep.
      scores: float64 [L, E], visits that fade with time; the placement's popularity to begin with.
    """

    def __init__(self, resident: np.ndarray, landing: int, popularity: np.ndarray | None = None):
        self.slot_of = np.full(resident.shape, -1, np.int32)
        self._holds: dict[int, tuple[int, int]] = {}
        for slot, place in enumerate(np.argwhere(resident)):
            self._settle((int(place[0]), int(place[1])), slot)
        count = len(self._holds)
        self.landing = deque(range(count, count + landing))
        self.scores = np.zeros(resident.shape)
        if popularity is not None and popularity.sum() > 0:
            # as much weight as some thirty steps that visit two experts of each layer
            self.scores += popularity / popularity.sum(axis=1, keepdims=True).clip(1e-9) * 2 / (1 - _DECAY)

    @property
    def slots(self) -> int:
        return len(self._holds) + len(self.landing)

    def of_layer(self, layer: int) -> np.ndarray:
        """bool [E]"""
        return self.slot_of[layer] >= 0

    def visit(self, layer: int, tokens: np.ndarray) -> None:
        """A step asked for the layer's experts: int [E] visits."""
        self.scores[layer] *= _DECAY
        self.scores[layer] += np.minimum(tokens, 1)

    def victim(self, layer: int, expert: int) -> tuple[int, int] | None:
        """The resident of any layer that the workload wants least, if it wants this expert clearly more."""
        if not self._holds:
            return None
        held = np.where(self.slot_of >= 0, self.scores, np.inf)
        place = np.unravel_index(np.argmin(held), held.shape)
        worth = self.scores[layer, expert] > _MARGIN * held[place] + 1
        return (int(place[0]), int(place[1])) if worth else None

    def keep(self, layer: int, expert: int, slot: int, victim: tuple[int, int]) -> None:
        """The expert in this landing slot stays; the victim's slot becomes a landing slot, its contents still there."""
        freed = int(self.slot_of[victim])
        self.slot_of[victim] = -1
        del self._holds[freed]
        self.landing.remove(slot)
        self._settle((layer, expert), slot)
        self.landing.append(freed)

    def _settle(self, place: tuple[int, int], slot: int) -> None:
        self.slot_of[place] = slot
        self._holds[slot] = place

    def check_integrity(self) -> None:
        """Assert that every slot is a resident's or a landing slot, and only one of both."""
        assert sorted([*self._holds, *self.landing]) == list(range(self.slots))
        assert {place: slot for slot, place in self._holds.items()} == {
            (int(a), int(b)): int(self.slot_of[a, b]) for a, b in np.argwhere(self.slot_of >= 0)
        }
