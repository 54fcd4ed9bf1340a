"""A checkpoint with the description of its model: what a conversion reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from convert.reader import SourceFolder
from convert.writer import pieces
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.manifest import Piece
from jaxinfer.models.tensor_spec import Shape, TensorSpec


@dataclass(frozen=True)
class Source:
    """Attributes:
    config: as it will be stored.
    specs: every tensor and its place, in plain storage.
    shapes: of plain storage.
    """

    folder: SourceFolder
    config: ModelConfig
    specs: tuple[TensorSpec, ...]
    shapes: dict[str, Shape]

    @property
    def dtype(self) -> np.dtype:
        """Of plain arrays as they will be stored."""
        name = self.config.dtype
        return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)

    def plain(
        self, size: int, wanted: Callable[[str], bool] = lambda target: True
    ) -> Iterator[tuple[Piece, np.ndarray]]:
        """Blocks of at most `size` bytes of the wanted arrays of storage, as they are."""
        for spec in self.specs:
            if not wanted(spec.target):
                continue
            tensor = self.folder.view(spec.name)
            for piece, block in pieces(spec, tensor, self.shapes[spec.target], self.dtype, size):
                self.folder.release()
                yield piece, block
