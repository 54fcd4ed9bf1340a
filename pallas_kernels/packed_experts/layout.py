"""The bytes of one expert: gate, up, scales of both, down, scales of down.

The columns of a matrix [K, N] are cut into tiles of 64, what is left of them into tiles of 16; a tile [K, 64] lies in one
piece, row by row, so that memory is read in order. In int4 a byte holds two rows of a column: an even one in the low
nibble, the next in the high one, as two's complement. Integers have a float32 scale for 128 (or fewer) rows of a column:
[K / 128, N].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

GROUP = 128  # most rows that share a scale
TILE, SMALL_TILE = 64, 16  # columns
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
    def offsets(self) -> tuple[int, int, int, int, int]:
        """Where gate, up, their scales, down and its scales begin."""
        half = self.model_dim * self.hidden_dim * self.bits // 8
        down = 2 * half + self._scale_bytes(self.model_dim, 2 * self.hidden_dim)
        return 0, half, 2 * half, down, down + half

    @cached_property
    def nbytes(self) -> int:
        return self.offsets[4] + self._scale_bytes(self.hidden_dim, self.model_dim)

    def _scale_bytes(self, rows: int, columns: int) -> int:
        return 4 * -(-rows // self.group) * columns if self.scaled else 0

    def pack(self, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
        """Floating weights [D, 2, F] (gate, up) and [F, D] as uint8 [nbytes]; integers are rounded to nearest.

        The largest weight of a group becomes 127, or 7.
        """
        return self._join(*(self._encode(part) for part in (gate_up[:, 0], gate_up[:, 1], down)))

    def pack_codes(self, gate: Rounded, up: Rounded, down: Rounded) -> np.ndarray:
        """As `pack`, of weights that are rounded already."""
        assert self.scaled
        lines = ((_nibbles(codes) if self.bits == 4 else codes, scales) for codes, scales in (gate, up, down))
        return self._join(*lines)

    def _join(self, gate: Rounded, up: Rounded, down: Rounded) -> np.ndarray:
        """The record of lines and scales."""
        scales = np.concatenate((gate[1], up[1]), axis=1, dtype=np.float32)
        parts = (_tiled(gate[0]), _tiled(up[0]), scales, _tiled(down[0]), down[1].astype(np.float32))
        return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])

    def _encode(self, weights: np.ndarray) -> Rounded:
        """The lines that are stored, and the scales (no rows for floating ones)."""
        if not self.scaled:
            dtype = np.float32 if self.bits == 32 else ml_dtypes.bfloat16
            stored = weights.astype(dtype)
            return stored.view(f"u{stored.dtype.itemsize}"), np.zeros((0, weights.shape[1]), np.float32)
        integers, scales = quantize(weights, _LARGEST[self.format], self.group)
        return (_nibbles(integers) if self.bits == 4 else integers), scales


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


def _nibbles(integers: np.ndarray) -> np.ndarray:
    """int8 [K, N] in -8..7 -> uint8 [K / 2, N]"""
    bits = integers.view(np.uint8) & 15
    return bits[0::2] | (bits[1::2] << 4)


def _tiled(lines: np.ndarray) -> np.ndarray:
    """[lines, N] -> its tiles one after another, flat."""
    whole = lines.shape[1] // TILE * TILE
    parts = []
    for part, width in ((lines[:, :whole], TILE), (lines[:, whole:], SMALL_TILE)):
        tiles = part.reshape(len(lines), part.shape[1] // width, width).swapaxes(0, 1)
        parts.append(np.ascontiguousarray(tiles).reshape(-1))
    return np.concatenate(parts)
