"""The bytes of one expert: gate, up, down, each a matrix [K, N] in tiles of columns, so that memory is read in order.

Floating: tiles of 64 columns, what is left of them in tiles of 16; a tile [K, 64] lies in one piece, row by row.

Integers: tiles of 16 columns, each group by group. A group is 128 (or fewer) rows, which share a float32 scale in each
column: first its lines, then the 16 scales. A line has four bytes of every column: four rows of it, or, where a byte holds
two rows, eight: the first four in the low halves, 8 more than they are, the others in the high ones as two's complement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

GROUP = 128  # most rows that share a scale
TILE, SMALL_TILE = 64, 16  # columns; integers have small tiles only
SCALES = 4 * SMALL_TILE  # bytes, of a group of a tile
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
FORMATS = tuple(_BITS)
_LARGEST = {"int8": 127, "int4": 7}
Rounded = tuple[np.ndarray, np.ndarray]
"""Integers int8 [K, N], -8 to 7 where they have four bits, and scales float32 [ceil(K / group), N]."""


@dataclass(frozen=True)
class Record:
    """Attributes:
    model_dim, hidden_dim: D and F, multiples of 16.
    format: "float32", "bfloat16", "int8" or "int4".
    group: rows that share a scale: 16, 32, 64 or 128.

    Raises:
      NotImplementedError: other widths or groups, or another format.
    """

    model_dim: int
    hidden_dim: int
    format: str
    group: int = GROUP

    def __post_init__(self):
        if self.format not in _BITS:
            raise NotImplementedError(f"weights of {self.format}; one of {FORMATS}")
        if self.group < 16 or GROUP % self.group:
            raise NotImplementedError(f"groups of {self.group}; 16, 32, 64 or {GROUP}")
        if self.model_dim % SMALL_TILE or self.hidden_dim % SMALL_TILE:
            raise NotImplementedError(
                f"model width {self.model_dim}, hidden width {self.hidden_dim}; multiples of {SMALL_TILE} go"
            )

    @property
    def bits(self) -> int:
        return _BITS[self.format]

    @property
    def scaled(self) -> bool:
        return self.bits <= 8

    @cached_property
    def offsets(self) -> tuple[int, int, int]:
        """Where gate, up and down begin."""
        gate = self._matrix_bytes(self.model_dim, self.hidden_dim)
        return 0, gate, 2 * gate

    @cached_property
    def nbytes(self) -> int:
        return self.offsets[2] + self._matrix_bytes(self.hidden_dim, self.model_dim)

    def _matrix_bytes(self, rows: int, columns: int) -> int:
        scales = -(-rows // self.group) * SCALES * columns // SMALL_TILE if self.scaled else 0
        return rows * columns * self.bits // 8 + scales

    def pack(self, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
        """Floating weights [D, 2, F] (gate, up) and [F, D] as uint8 [nbytes]; integers are rounded to nearest.

        The largest weight of a group becomes 127, or 7.
        """
        return self._join(self._encode(part) for part in (gate_up[:, 0], gate_up[:, 1], down))

    def pack_codes(self, gate: Rounded, up: Rounded, down: Rounded) -> np.ndarray:
        """As `pack`, of weights that are rounded already."""
        assert self.scaled
        return self._join(self._blocks(*part) for part in (gate, up, down))

    def _join(self, parts: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def _encode(self, weights: np.ndarray) -> np.ndarray:
        if self.scaled:
            return self._blocks(*quantize(weights, _LARGEST[self.format], self.group))
        return _tiled(weights.astype(np.float32 if self.bits == 32 else ml_dtypes.bfloat16))

    def _blocks(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Integers and scales as bytes, a row for each tile."""
        tiles, depth = codes.shape[1] // SMALL_TILE, 32 // self.bits
        fours = codes.view(np.uint8).reshape(-1, depth, tiles, SMALL_TILE).transpose(2, 0, 3, 1)
        lines = (_halved(fours) if self.bits == 4 else fours).reshape(tiles, -1)
        by_tile = scales.astype(np.float32).reshape(-1, tiles, SMALL_TILE).swapaxes(0, 1)
        factors = np.ascontiguousarray(by_tile).view(np.uint8).reshape(tiles, -1, SCALES)
        size = self.group * SMALL_TILE * self.bits // 8
        whole = codes.shape[0] // self.group
        groups = lines[:, : whole * size].reshape(tiles, whole, size)
        joined = np.concatenate((groups, factors[:, :whole]), axis=2).reshape(tiles, -1)
        return np.concatenate((joined, lines[:, whole * size :], *factors[:, whole:].swapaxes(0, 1)), axis=1)


def quantize(weights: np.ndarray, largest: int, rows_of_group: int = GROUP) -> Rounded:
    """Symmetric, rounded to nearest: [K, N] -> int8 [K, N] and float32 scales [ceil(K / rows_of_group), N]."""
    rows, columns = weights.shape
    scales = np.empty((-(-rows // rows_of_group), columns), np.float32)
    integers = np.empty((rows, columns), np.int8)
    for group, first in enumerate(range(0, rows, rows_of_group)):
        block = weights[first : first + rows_of_group].astype(np.float32)
        scales[group] = np.abs(block).max(axis=0) / largest
        divisors = np.where(scales[group] > 0, scales[group], 1)
        integers[first : first + rows_of_group] = np.rint(block / divisors).astype(np.int8)
    return integers, scales


def _halved(eights: np.ndarray) -> np.ndarray:
    """Eight rows of a column as four bytes."""
    return ((eights[..., :4] + 8) & 15) | (eights[..., 4:] << 4)


def _tiled(lines: np.ndarray) -> np.ndarray:
    """[lines, N] -> its tiles one after another, flat."""
    whole = lines.shape[1] // TILE * TILE
    parts = []
    for part, width in ((lines[:, :whole], TILE), (lines[:, whole:], SMALL_TILE)):
        tiles = part.reshape(len(lines), part.shape[1] // width, width).swapaxes(0, 1)
        parts.append(np.ascontiguousarray(tiles).reshape(-1))
    return np.concatenate(parts)
