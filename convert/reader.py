"""Reads safetensors folders by memory map: one tensor's bytes are touched at a time, and let go of when copied."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxinfer.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor lies: the file, and its first byte in that file."""

    name: str
    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SourceFolder:
    """The safetensors files of a Hugging Face folder, one file or sharded by an index.

    Attributes:
      files: names of the safetensors files, in the order of their names.
      tensors: every tensor by name.

    Raises:
      ModelError: no safetensors, a missing shard, or a file that is truncated or corrupt.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._maps: dict[str, mmap.mmap] = {}
        weight_map = _weight_map(folder)
        if weight_map is None:
            self.files: tuple[str, ...] = (SINGLE,)
            self.tensors = read_header(folder / SINGLE)
        else:
            self.files = tuple(sorted(set(weight_map.values())))
            self.tensors = _read_shards(folder, self.files, weight_map)

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the mapped file; nothing is read until it is touched."""
        tensor = self.tensors[name]
        if tensor.nbytes == 0:
            return np.zeros(tensor.shape, tensor.dtype)
        count = math.prod(tensor.shape)
        flat = np.frombuffer(self._map(tensor.file), tensor.dtype, count, tensor.offset)
        return flat.reshape(tensor.shape)

    def release(self) -> None:
        """Lets go of every page read so far: mapped pages count as this process's memory until then."""
        for pages in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with open(self.folder / file, "rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def read_header(path: Path) -> dict[str, SourceTensor]:
    """The tensors of one safetensors file, every entry checked against the file's size.

    Raises:
      ModelError: the file is missing, truncated, or its header is not one of safetensors.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ModelError(_not_safetensors(path, size, length))
            raw = handle.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: its safetensors header is corrupt: {error}") from error
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _not_safetensors(path: Path, size: int, length: int) -> str:
    with open(path, "rb") as handle:
        if handle.read(23) == b"version https://git-lfs":
            return f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    return f"{path}: is truncated or not a safetensors file: {size} bytes, header of {length} announced"


def _entry(path: Path, name: str, entry: dict, start: int, size: int) -> SourceTensor:
    if entry["dtype"] not in DTYPES:
        raise ModelError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}"
        )
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(n) for n in entry["shape"])
    tensor = SourceTensor(name, path.name, DTYPES[entry["dtype"]], shape, start + begin)
    if begin < 0 or min(shape, default=0) < 0 or end - begin != tensor.nbytes:
        raise ModelError(
            f"{path}: tensor {name!r} of shape {list(shape)} needs {tensor.nbytes} bytes, "
            f"its header gives bytes {begin} to {end}"
        )
    if start + end > size:
        raise ModelError(f"{path}: is truncated: tensor {name!r} ends at byte {start + end} of {size}")
    return tensor


def _check_layout(path: Path, tensors: dict[str, SourceTensor], start: int, size: int) -> None:
    """The format allows neither holes nor overlaps nor bytes after the last tensor."""
    at = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            raise ModelError(
                f"{path}: is corrupt: tensor {tensor.name!r} begins at {tensor.offset}, not {at}"
            )
        at += tensor.nbytes
    if at != size:
        raise ModelError(f"{path}: is corrupt: {size} bytes long, its tensors end at {at}")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name of a sharded folder; None for a single file."""
    if (folder / SINGLE).is_file():
        return None
    path = folder / INDEX
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.gguf"))
        found = f"; found {', '.join(others[:3])}, which are not read" if others else ""
        raise ModelError(f"{folder}: has neither {SINGLE} nor {INDEX}{found}")
    try:
        weight_map = dict(json.loads(path.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: is not a safetensors index: {error}") from error
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{path}: tensor {name!r} is said to lie in {file!r}, which is not a file name")
    return weight_map


def _read_shards(folder: Path, files: tuple[str, ...], weight_map: dict[str, str]) -> dict[str, SourceTensor]:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ModelError(f"{folder}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}")
    headers = {file: read_header(folder / file) for file in files}
    absent = [name for name, file in weight_map.items() if name not in headers[file]]
    if absent:
        raise ModelError(
            f"{folder}: {INDEX} names tensors that their shards lack: {', '.join(sorted(absent)[:8])}"
        )
    return {name: headers[file][name] for name, file in weight_map.items()}
