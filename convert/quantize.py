"""The quantized way through a conversion: layer by layer, kept on the way, with a report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.layers import described, layer_pieces, read_layer
from convert.report import write_report
from convert.source import Source
from convert.workshop import Workshop, folder_of
from jaxinfer.errors import ConfigError
from jaxinfer.models.manifest import Piece
from jaxinfer.models.tokenizer import Tokenizer, has_tokenizer
from jaxinfer.quant.calibrate import LayerReport, quantize_layers
from jaxinfer.quant.form import Quantization
from jaxinfer.quant.text import encode, windows


@dataclass(frozen=True)
class Quantize:
    """What a conversion is asked for.

    Attributes:
      mode, chosen: see `jaxinfer.quant.form.quantization`.
      text: file of calibration text; None for modes that need none.
      told: called with the report of every layer as it is done.
    """

    mode: str
    chosen: dict[str, Any] = field(default_factory=dict)
    text: Path | None = None
    told: Callable[[LayerReport], None] = lambda report: None


def quantized(
    source: Source, asked: Quantize, out: Path, building: Path, size: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """All pieces of the quantized model, each with its type. Layers that an earlier, killed run finished are taken over.

    Raises:
      ConfigError: there is no calibration text, or too little; there is no tokenizer.
      ModelError: weights that are not finite.
    """
    form = source.config.quantization
    assert form is not None
    text = _windows(asked, form, source, building)
    for piece, block in source.plain(size, wanted=lambda target: not target.startswith("layers.")):
        yield replace(piece, dtype=block.dtype.name), block
    plain = replace(source.config, quantization=None)
    before, after = described(plain), described(source.config)
    shop = Workshop(out, source.folder.folder, source.folder.files, source.config, text)
    layers = (
        read_layer(i, like, source.folder, source.specs, source.shapes, plain.moe_layers[i])
        for i, like in enumerate(before)
    )
    reports = []
    made = quantize_layers(plain, form, _embedding(source), layers, text, lambda i: shop.load(i, after[i]))
    for layer, report in made:
        if report.index >= shop.finished:
            shop.save(layer, report)
        reports.append(report)
        asked.told(report)
        stored = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), layer, after[report.index])
        yield from layer_pieces(report.index, stored, plain.moe_layers[report.index], size)
    write_report(building, reports)


def forget_layers(out: Path) -> None:
    """Removes what was kept for a run that goes on: this one is done."""
    shutil.rmtree(folder_of(out), ignore_errors=True)


def _embedding(source: Source) -> np.ndarray:
    spec = next(spec for spec in source.specs if spec.target == "embed")
    return np.asarray(spec.read(source.folder.view(spec.name)))


def _windows(asked: Quantize, form: Quantization, source: Source, building: Path) -> np.ndarray:
    if asked.text is None:
        if form.needs_text:
            raise ConfigError(
                f"--quant {form.mode} needs --calibration FILE with some text; "
                "about a million characters are good"
            )
        return np.zeros((0, 0), np.int32)
    if not has_tokenizer(building):
        raise ConfigError(f"{source.folder.folder}: has no tokenizer, so calibration text cannot be read")
    try:
        read = asked.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{asked.text}: calibration text cannot be read: {error}") from error
    tokens = encode(read, Tokenizer(building).encode)
    return windows(tokens, form, source.config.context_length)
