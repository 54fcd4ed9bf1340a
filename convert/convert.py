"""Turns a Hugging Face folder into a jaxinfer folder: checked against the model's own description, streamed, atomic."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from convert.check import check_tensors, check_tokenizer, check_vocabulary
from convert.output import new_folder
from convert.quantize import Quantize, forget_layers, quantized
from convert.reader import INDEX, SourceFolder
from convert.source import Source
from convert.writer import PartWriter, part_size
from jaxinfer.engine.memory import weight_bytes
from jaxinfer.errors import ModelError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import from_hugging_face
from jaxinfer.models.manifest import MANIFEST, PARAMS, Manifest
from jaxinfer.models.tensors import storage_shapes, tensor_table
from jaxinfer.quant.form import quantization

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all)."""

CARRIED = (  # what a tokenizer may need (config.json: some tokenizers take their class from it), and the model's licence
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "checkpoint"] = "checkpoint",
    quantize: Quantize | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Writes `out` from a Hugging Face folder. Whatever happens, `out` is either whole or not there.

    Args:
      dtype: of the stored parameters; "checkpoint" keeps the type that the model's config names.
      quantize: how the linear layers are quantized; None keeps them as they are.
      overwrite: replaces `out` if it is a converted model.
      progress: called after every block.

    Raises:
      ModelError: the folder cannot be converted, or `out` cannot be written; says why.
      ConfigError: the model cannot be quantized so, or the calibration text is too short.
    """
    source, out = Path(source), Path(out)
    config, folder = read_config(source), SourceFolder(source)
    kept = config.dtype if dtype == "checkpoint" else dtype
    config = replace(config, dtype=kept)
    specs = tensor_table(config, folder.tensors)
    shapes = storage_shapes(config)
    check_tensors(source, folder.tensors, specs, config)
    check_vocabulary(source, config)
    form = None if quantize is None else quantization(quantize.mode, config, **quantize.chosen)
    stored = replace(config, quantization=form)
    total = weight_bytes(stored, kept)
    with new_folder(out, total, overwrite) as building, _hashing(source, folder.files) as hashes:
        for path in carried_files(source):
            shutil.copyfile(path, building / path.name)
        check_tokenizer(source, building, config)
        writer = PartWriter(building / PARAMS, part_size(max(t.nbytes for t in folder.tensors.values())))
        model = Source(folder, stored, specs, shapes)
        made = (
            model.plain(writer.size)
            if quantize is None
            else quantized(model, quantize, out, building, writer.size)
        )
        done = 0
        for piece, block in made:
            writer.add(piece, block)
            done += block.nbytes
            progress(done, total)
        writer.save()
        sources = {name: future.result() for name, future in hashes.items()}
        manifest = Manifest(config=stored, sources=sources, parts=tuple(writer.parts))
        (building / MANIFEST).write_text(json.dumps(manifest.to_json()))
    if quantize is not None:
        forget_layers(out)
    return manifest


def read_config(source: Path) -> ModelConfig:
    """The model of a Hugging Face folder, as its config.json and generation_config.json describe it."""
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder")
    if (source / MANIFEST).is_file():
        raise ModelError(f"{source}: is converted already; give the Hugging Face folder")
    if not (source / "config.json").is_file():
        raise ModelError(f"{source}: has no config.json, so it is not a Hugging Face model folder")
    generation = source / "generation_config.json"
    return from_hugging_face(
        _read_json(source / "config.json"), _read_json(generation) if generation.is_file() else None
    )


def carried_files(source: Path) -> list[Path]:
    """The files that are copied as they are."""
    return sorted(path for pattern in CARRIED for path in source.glob(pattern) if path.is_file())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: holds {type(data).__name__}, not an object")
    return data


@contextlib.contextmanager
def _hashing(source: Path, weights: tuple[str, ...]) -> Iterator[dict[str, Future[str]]]:
    """SHA-256 of every source file, computed beside the conversion."""
    names = [*(path.name for path in carried_files(source)), *weights]
    if (source / INDEX).is_file():
        names.append(INDEX)
    pool = ThreadPoolExecutor(1)
    try:
        yield {name: pool.submit(_sha256, source / name) for name in names}
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
