"""Where the parts of one parameter go: a buffer on every device, filled piece by piece."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
Runs = tuple[tuple[int, int], ...]
"""Stretches [start, stop) of one axis, in the order in which they lie on the device."""


@dataclass(frozen=True)
class Placement:
    """Attributes:
    shape: of the parameter as it is stored.
    joined: of the array that the devices' shares make up, one beside the other; larger where devices hold parts twice.
    sharding: of that array.
    runs: what each device holds of the parameter, by axis; all devices as much.
    """

    shape: Shape
    joined: Shape
    sharding: jax.sharding.Sharding
    runs: Mapping[jax.Device, tuple[Runs, ...]]

    @classmethod
    def of(cls, shape: Shape, sharding: jax.sharding.Sharding) -> Placement:
        """As JAX itself would lay it out."""
        indices = sharding.addressable_devices_indices_map(shape)
        runs = {
            device: tuple((cut.indices(n)[:2],) for cut, n in zip(index or (), shape))
            for device, index in indices.items()
        }
        return cls(shape, shape, sharding, runs)

    @property
    def share(self) -> Shape:
        """Shape of what one device holds."""
        return tuple(sum(stop - start for start, stop in runs) for runs in next(iter(self.runs.values())))


class Slot:
    """One parameter on its way to the devices."""

    def __init__(self, dtype: jnp.dtype, placement: Placement):
        self.shape, self.dtype, self._placement = placement.shape, dtype, placement
        self._boxes = {device: list(_boxes(runs)) for device, runs in placement.runs.items()}
        self._buffers: dict[jax.Device, jax.Array] = {}

    def holds(self, start: Shape, shape: Shape) -> bool:
        """Whether a block of this shape may begin there."""
        lead = len(start) - len(shape)  # a stacked parameter has one more axis than the pieces of its layers
        ends = [s + n for s, n in zip(start, (1,) * lead + shape)]
        return len(start) == len(self.shape) and all(end <= n for end, n in zip(ends, self.shape))

    def put(self, start: Shape, block: np.ndarray) -> None:
        """Writes a block to the devices that hold any of it."""
        block = block.reshape((1,) * (len(start) - block.ndim) + block.shape)
        for device, boxes in self._boxes.items():
            for bounds, offset in boxes:
                low = [max(at, a) for at, (a, _) in zip(start, bounds)]
                high = [min(at + n, b) for at, n, (_, b) in zip(start, block.shape, bounds)]
                if any(a >= b for a, b in zip(low, high)):
                    continue
                cut = block[tuple(slice(a - at, b - at) for a, b, at in zip(low, high, start))]
                self._write(device, [o + a - first for o, a, (first, _) in zip(offset, low, bounds)], cut)

    def _write(self, device: jax.Device, at: list[int], cut: np.ndarray) -> None:
        moved = jax.device_put(cut, device)
        if cut.shape == self._placement.share:
            self._buffers[device] = moved.astype(self.dtype)
            return
        if device not in self._buffers:
            self._buffers[device] = jnp.zeros(self._placement.share, self.dtype, device=device)
        self._buffers[device] = _fill(self._buffers[device], moved, np.asarray(at, np.int32))

    def array(self) -> jax.Array:
        """All of it, once everything is put."""
        place = self._placement
        shards = [self._buffers[device] for device in self._boxes]
        return jax.make_array_from_single_device_arrays(place.joined, place.sharding, shards)


def _boxes(runs: tuple[Runs, ...]) -> Iterator[tuple[Runs, Shape]]:
    """Every block of the parameter that a device holds in one piece, and where it begins in the device's share."""
    by_axis = []
    for of_axis in runs:
        lengths = [stop - start for start, stop in of_axis]
        by_axis.append(list(zip(of_axis, itertools.accumulate(lengths, initial=0))))
    for box in itertools.product(*by_axis):
        yield tuple(run for run, _ in box), tuple(offset for _, offset in box)


@jax.jit(donate_argnums=0)
def _fill(buffer: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype), tuple(at))
