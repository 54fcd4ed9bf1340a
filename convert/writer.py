"""Writes parameters as parts: blocks of tensors gathered to a few tens of MB, each gathering one small Orbax checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from orbax.checkpoint import PyTreeCheckpointer

from jaxinfer.errors import ModelError
from jaxinfer.models.manifest import Part, Piece, checksum, size_on_disk
from jaxinfer.models.tensors import Index, Shape, TensorSpec

MAX_PART = (
    64 << 20
)  # bytes; beyond this neither saving nor restoring gets faster (about 12 and 3 ms each part)
MIN_PART = 8 << 20


def part_size(largest_tensor: int) -> int:
    """Bytes of a part. Saving holds about three times as much: mapped source pages, the part, and Orbax's copy of it."""
    return min(MAX_PART, max(MIN_PART, largest_tensor // 4))


class PartWriter:
    """Gathers pieces and saves them part by part; `parts` lists what has been saved."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size
        self.parts: list[Part] = []
        self._pieces: list[Piece] = []
        self._blocks: list[np.ndarray] = []
        self._held = 0  # bytes
        # Uncompressed: bfloat16 weights shrink by a fifth only, and restore more than twice as slowly.
        self._checkpointer = PyTreeCheckpointer(use_compression=False)

    def add(self, piece: Piece, block: np.ndarray) -> None:
        """Takes a block for the current part, saving that one first if the block would overfill it."""
        if self._held + block.nbytes > self.size:
            self.save()
        self._held += block.nbytes
        self._pieces.append(piece)
        self._blocks.append(block)

    def save(self) -> None:
        if not self._pieces:
            return
        name = f"{len(self.parts):05d}"
        tree = {piece.key: block for piece, block in zip(self._pieces, self._blocks)}
        path = (self.folder / name).absolute()
        try:
            self._checkpointer.save(path, tree)
            # It names the folder where it was written, and readers of plain file systems do not ask for it.
            (path / "commit_success.txt").unlink(missing_ok=True)
        except Exception as error:  # tensorstore reports a full disk as ValueError
            raise ModelError(f"{self.folder}: cannot be written: {str(error).splitlines()[0]}") from error
        self.parts.append(Part(name, size_on_disk(path), checksum(self._blocks), tuple(self._pieces)))
        self._pieces, self._blocks, self._held = [], [], 0


def pieces(
    spec: TensorSpec, tensor: np.ndarray, shape: Shape, dtype: np.dtype, size: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Cuts what `spec` takes from a tensor into blocks of at most `size` bytes, each copied when it is asked for.

    Args:
      tensor: the whole source tensor, mapped.
      shape: of the storage array that it goes to.
      dtype: to store.
    """
    view = spec.read(tensor)
    first, fixed = _corner(spec.slot, shape)
    view = np.expand_dims(view, fixed)
    for start, block in blocks(view, size // max(dtype.itemsize, view.dtype.itemsize)):
        at = tuple(a + b for a, b in zip(first, start))
        yield Piece(spec.target, at, block.shape), _copy(block).astype(dtype, copy=False)


def blocks(view: np.ndarray, elements: int) -> Iterator[tuple[Shape, np.ndarray]]:
    """Cuts an array into blocks of at most so many elements, along its outermost axis in memory, so that the bytes of a
    block lie together in the file."""
    if view.size <= elements or view.size <= 1:
        yield (0,) * view.ndim, view
        return
    axis = max((a for a in range(view.ndim) if view.shape[a] > 1), key=lambda a: view.strides[a])
    step = max(1, elements * view.shape[axis] // view.size)
    for begin in range(0, view.shape[axis], step):
        cut = view[(slice(None),) * axis + (slice(begin, begin + step),)]
        for start, block in blocks(cut, elements):
            yield (*start[:axis], start[axis] + begin, *start[axis + 1 :]), block


def _corner(slot: Index, shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Where a slot begins in an array of this shape, and which axes it holds at one index."""
    whole = (*slot, *(slice(None),) * (len(shape) - len(slot)))
    first = tuple(s.indices(n)[0] if isinstance(s, slice) else s for s, n in zip(whole, shape))
    return first, tuple(axis for axis, s in enumerate(whole) if not isinstance(s, slice))


def _copy(block: np.ndarray) -> np.ndarray:
    """A contiguous copy. Bits are moved as integers: NumPy copies bfloat16, a foreign type to it, one call an element."""
    bits = block.view(f"u{block.dtype.itemsize}")
    copy = np.empty(bits.shape, bits.dtype)
    _transpose_into(copy, bits)
    return copy.view(block.dtype)


def _transpose_into(copy: np.ndarray, view: np.ndarray) -> None:
    """copy[...] = view, by strips of the axis that is outermost in the view and innermost in the copy.

    A strip of 16 keeps every cache line in use while it is here: 5 to 10 times faster than one assignment.
    """
    axes = sorted((a for a in range(view.ndim) if view.shape[a] > 1), key=lambda a: -view.strides[a])
    if axes == sorted(axes):
        copy[...] = view
        return
    step = 16 if axes[0] == view.ndim - 1 else 1
    for begin in range(0, view.shape[axes[0]], step):
        cut = (slice(None),) * axes[0] + (slice(begin, begin + step),)
        if step > 1:
            copy[cut] = view[cut]
        else:
            _transpose_into(copy[cut], view[cut])
