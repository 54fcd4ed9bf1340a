"""What a converted model folder says about itself: `jaxinfer.json`.

The folder has this manifest, the tokenizer's own files, and `params/`: many small Orbax checkpoints, the parts, each a
dictionary of pieces. A piece is a block of one parameter of storage (paths as in `tensors`), at most a few tens of MB, so
neither writing nor reading ever holds more than a few pieces beside the model itself.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.errors import ModelError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.serialized import form_from_json, form_to_json, from_json, to_json
from jaxinfer.quant.form import Quantization

MANIFEST = "jaxinfer.json"
PARAMS = "params"
FORMAT = 1  # of plain models
QUANTIZED_FORMAT = 2  # every piece names its type


@dataclass(frozen=True)
class Piece:
    """A block of one parameter: which parameter of the per-layer tree, where the block begins, its shape, and its type (None
    in plain models: the model's own)."""

    leaf: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str | None = None

    @property
    def key(self) -> str:
        """Its name inside the part."""
        return f"{self.leaf}@{','.join(map(str, self.start))}"


@dataclass(frozen=True)
class Part:
    """One Orbax checkpoint of `params/`.

    Attributes:
      nbytes: of all its files together, to find incomplete copies before anything is read.
      crc32: over the bytes of its pieces in order, because Orbax checks none.
    """

    name: str
    nbytes: int
    crc32: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `jaxinfer.json` says.

    Attributes:
      config: of the model; its dtype is that of every stored parameter.
      sources: SHA-256 of every file that the folder was converted from, by file name.
      quantization: None; reserved for low-bit weights.
    """

    config: ModelConfig
    sources: dict[str, str]
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def quantization(self) -> Quantization | None:
        return self.config.quantization

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model's results: same sources, config, type and quantization, same fingerprint."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def _identity(self) -> dict[str, Any]:
        return {
            "format": FORMAT if self.quantization is None else QUANTIZED_FORMAT,
            "config": to_json(self.config),
            "quantization": form_to_json(self.quantization),
            "sources": self.sources,
        }

    def to_json(self) -> dict[str, Any]:
        return self._identity() | {"parts": [_part_to_json(part) for part in self.parts]}


def read_manifest(folder: str | Path) -> Manifest:
    """What a converted folder holds, without reading its parameters.

    Raises:
      ModelError: no such folder, not a converted one, or of a format that this version does not read.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(_not_converted(folder))
    try:
        data = json.loads(path.read_bytes())
        known = QUANTIZED_FORMAT if data["quantization"] is not None else FORMAT
        if data["format"] != known:
            raise ModelError(
                f"{path}: format {data['format']}, quantization {data['quantization']}: this version of jaxinfer "
                f"reads format {FORMAT} without quantization and {QUANTIZED_FORMAT} with it; convert the model "
                f"again, or update jaxinfer"
            )
        config = replace(from_json(data["config"]), quantization=form_from_json(data["quantization"]))
        parts = tuple(_part(part) for part in data["parts"])
        return Manifest(config=config, sources=dict(data["sources"]), parts=parts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: is corrupt: {type(error).__name__}: {error}") from error


def _part(data: dict[str, Any]) -> Part:
    pieces = (Piece(p["leaf"], tuple(p["start"]), tuple(p["shape"]), p.get("dtype")) for p in data["pieces"])
    return Part(data["name"], data["nbytes"], data["crc32"], tuple(pieces))


def _part_to_json(part: Part) -> dict[str, Any]:
    values = asdict(part)
    for piece in values["pieces"]:
        if piece["dtype"] is None:
            del piece["dtype"]
    return values


def _not_converted(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such model folder"
    if (folder / "config.json").is_file():
        command = f"jaxinfer-convert {folder} {folder}-jaxinfer"
        return f"{folder}: is a Hugging Face folder, not a converted one; convert it first: {command}"
    return f"{folder}: is not a converted model: it has no {MANIFEST}"


def size_on_disk(folder: Path) -> int:
    """Bytes of all files in a folder and below; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def checksum(blocks: Iterable[np.ndarray]) -> int:
    """CRC-32 of the arrays' bytes, one after another."""
    crc = 0
    for block in blocks:
        crc = zlib.crc32(np.ascontiguousarray(block).reshape(-1).view(np.uint8), crc)
    return crc
