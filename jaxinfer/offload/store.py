"""The experts of a model as one file of records, mapped into memory: the only copy that the host holds."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxinfer.errors import ConfigError, ModelError
from jaxinfer.models.checkpoint import of_expert, read_pieces
from jaxinfer.models.manifest import Manifest
from jaxinfer.offload.records import leaf_shapes, pack
from pallas_kernels.packed_experts import Record

_LAYOUT = 2  # of the records; another one makes another file


class ExpertStore:
    """Attributes:
    layers: numbers of the model's layers that have experts; rows of everything here are places in this tuple.
    records: uint8 [L * E, record.nbytes], mapped, read-only.
    """

    def __init__(self, path: Path, record: Record, layers: tuple[int, ...], experts: int):
        self.record, self.layers, self.experts = record, layers, experts
        shape = (len(layers) * experts, record.nbytes)
        self.records: np.ndarray = np.memmap(path, np.uint8, "r", shape=shape)

    @classmethod
    def open(cls, folder: str | Path, manifest: Manifest, record: Record, where: str) -> ExpertStore:
        """The experts of a converted model, written as records at the first use.

        Args:
          folder: the converted model.
          record: see `records.expert_record`.
          where: folder for the records; "auto" is the user's cache folder.

        Raises:
          ModelError: the model cannot be read.
          ConfigError: no room or no right to write the records.
        """
        config = manifest.config
        assert config.moe is not None
        layers = tuple(layer for layer, has_experts in enumerate(config.moe_layers) if has_experts)
        path = _cache(where) / f"{manifest.fingerprint[:16]}-{record.format}-{_LAYOUT}.experts"
        nbytes = len(layers) * config.moe.experts * record.nbytes
        try:
            if not path.is_file() or path.stat().st_size != nbytes:
                _write(path, nbytes, _packed(folder, manifest, record, layers))
        except OSError as error:
            raise ConfigError(
                f"offload.folder = {where!r}: the experts ({nbytes} bytes) cannot be written to {path.parent}: "
                f"{error.strerror or error}; name a folder with room for them"
            ) from None
        return cls(path, record, layers, config.moe.experts)

    @property
    def nbytes(self) -> int:
        return self.records.nbytes

    def of_layer(self, row: int) -> np.ndarray:
        """uint8 [E, record.nbytes]"""
        return self.records[row * self.experts : (row + 1) * self.experts]

    def forget(self, row: int, expert: int) -> None:
        """Its pages need not stay in this process's memory: the device has a copy. They come back when they are read."""
        start = (row * self.experts + expert) * self.record.nbytes
        page = mmap.PAGESIZE
        first, end = -(-start // page) * page, (start + self.record.nbytes) // page * page
        mapping = self.records.base if self.records.base is not None else self.records._mmap  # type: ignore[attr-defined]
        if end > first and isinstance(mapping, mmap.mmap) and hasattr(mapping, "madvise"):
            mapping.madvise(mmap.MADV_DONTNEED, first, end - first)


def _cache(where: str) -> Path:
    if where != "auto":
        return Path(where)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfer" / "experts"


def _write(path: Path, nbytes: int, records: Iterator[tuple[int, np.ndarray]]) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            for place, record in records:
                file.seek(place * len(record))
                file.write(record)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _packed(
    folder: str | Path, manifest: Manifest, record: Record, layers: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray]]:
    """Every record with its place, in the order in which the checkpoint completes them."""
    config = manifest.config
    assert config.moe is not None
    experts = config.moe.experts
    rows = {layer: row for row, layer in enumerate(layers)}
    shapes = leaf_shapes(config)
    open_ones: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    missing: dict[tuple[int, int], int] = {}
    done = 0
    for piece, block in read_pieces(folder, manifest, of_expert):
        place = of_expert(piece)
        assert place is not None
        name = piece.leaf.partition(f"experts.{place[1]}.")[2]
        if place[0] not in rows or place[1] >= experts or name not in shapes:
            raise ModelError(f"{folder}: does not match its own config: {piece.key}")
        leaves = open_ones.setdefault(place, {})
        if name not in leaves:
            leaves[name] = np.empty(shapes[name], block.dtype)
        cut = tuple(slice(at, at + n) for at, n in zip(piece.start, block.shape, strict=True))
        leaves[name][cut] = block
        missing[place] = missing.get(place, sum(map(math.prod, shapes.values()))) - block.size
        if missing[place] == 0:
            done += 1
            yield rows[place[0]] * experts + place[1], pack(record, open_ones.pop(place), config.quantization)
    if open_ones or done != len(layers) * experts:
        raise ModelError(
            f"{folder}: does not match its own config: {done} whole experts of {len(layers) * experts}"
        )
