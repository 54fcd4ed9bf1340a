"""Quantized layers on their way: kept beside the output while a conversion runs, so that one that was killed goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from convert.layers import from_named, named
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Layer
from jaxinfer.models.serialized import form_to_json, to_json
from jaxinfer.quant.calibrate import LayerReport
from jaxinfer.quant.matrices import MatrixReport

KEY = "key.json"


def folder_of(out: Path) -> Path:
    """Where the layers for an output are kept."""
    return out.absolute().parent / f".{out.name}.quantizing"


class Workshop:
    """A hidden folder beside OUT_FOLDER with one file a finished layer. What another source, config, form or text left is removed."""

    def __init__(
        self, out: Path, source: Path, files: tuple[str, ...], config: ModelConfig, windows: np.ndarray
    ):
        self.folder = folder_of(out)
        stats = [(name, (source / name).stat()) for name in files]
        key = {
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "config": to_json(config),
            "form": form_to_json(config.quantization),
            "text": hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest(),
        }
        path = self.folder / KEY
        if not path.is_file() or path.read_text() != json.dumps(key):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            path.write_text(json.dumps(key))

    def load(self, index: int, like: Layer) -> tuple[Layer, LayerReport] | None:
        """A finished layer as it was saved, or None."""
        path = self._path(index)
        if not path.is_file():
            return None
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        report = json.loads(str(arrays.pop("report")))
        matrices = tuple(MatrixReport(**matrix) for matrix in report.pop("matrices"))
        return from_named(arrays, like), LayerReport(matrices=matrices, **report)

    def save(self, layer: Layer, report: LayerReport) -> None:
        """Keeps a layer, whole or not at all."""
        arrays: dict[str, Any] = {**named(layer)}
        arrays["report"] = np.asarray(json.dumps(dataclasses.asdict(report)))
        path = self._path(report.index)
        with open(path.with_suffix(".partial"), "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".partial"), path)

    @property
    def finished(self) -> int:
        """Layers that are done."""
        return len(list(self.folder.glob("layer-*.npz")))

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.npz"
