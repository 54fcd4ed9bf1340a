"""One piece of a checkpoint tensor, and its place in our storage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxinfer.models.config import ModelConfig

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]
EVERYTHING: Index = ()
EVERY = slice(None)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One piece of a checkpoint tensor and its place. A fused tensor has several pieces: several specs of one name.

    Attributes:
      name: of the tensor in the checkpoint.
      shape: of the whole tensor in the checkpoint.
      source: index of the piece in that tensor; () is all of it.
      split: shape that the piece is viewed as, before `axes`.
      axes: then its axes in this order.
      target: path of the array in storage.
      slot: index in that array which the piece fills; () is all of it.
      part: what the piece is, for messages: "q", "gate", "router", ...
    """

    name: str
    shape: Shape
    target: str
    part: str
    split: Shape
    axes: tuple[int, ...]
    source: Index = EVERYTHING
    slot: Index = EVERYTHING

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The piece as it lies in storage: a view of the checkpoint's tensor, [*shape] -> [*target[slot]]."""
        return tensor[self.source].reshape(self.split).transpose(self.axes)

    def place(self, tensor: np.ndarray, target: np.ndarray) -> None:
        """Writes the piece of the checkpoint's tensor into the storage array."""
        target[self.slot] = self.read(tensor)


def norm(source: str, target: str, config: ModelConfig) -> Iterator[TensorSpec]:
    yield whole(f"{source}.weight", f"{target}.scale", "norm", (config.hidden_size,))
    if config.norm == "layer":
        yield whole(f"{source}.bias", f"{target}.bias", "norm", (config.hidden_size,))


def whole(
    name: str, target: str, part: str, shape: Shape, *, slot: Index = EVERYTHING, flat: bool = False
) -> TensorSpec:
    stored = (math.prod(shape),) if flat else shape
    axes = tuple(range(len(shape)))
    return TensorSpec(name=name, shape=stored, target=target, part=part, split=shape, axes=axes, slot=slot)


def matrix(
    name: str, target: str, part: str, outputs: int, inputs: int, *, slot: Index = EVERYTHING
) -> TensorSpec:
    """A torch Linear keeps [outputs, inputs]; ours is [inputs, outputs]."""
    shape = (outputs, inputs)
    return TensorSpec(name=name, shape=shape, target=target, part=part, split=shape, axes=(1, 0), slot=slot)


def fused_gate_up(name: str, target: str, wide: int, width: int) -> TensorSpec:
    return TensorSpec(
        name=name,
        shape=(2 * width, wide),
        split=(2, width, wide),
        axes=(2, 0, 1),
        target=target,
        part="gate_up",
    )
