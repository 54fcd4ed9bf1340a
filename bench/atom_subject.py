"""One model, plain and quantized in every way, judged on one text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.likelihood import AS_IT_IS, Cache, perplexity
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder
from jaxinfer.quant.form import quantization
from jaxinfer.quant.model import quantize_model
from jaxinfer.quant.text import windows

PLAIN = {
    "method": "rtn",
    "group": 0,
    "outliers": 0,
    "reorder": False,
    "weight_clip": 1.0,
    "activation_clip": 1.0,
}
# The paper's ladder (table 4): each step keeps those before it. {o}: the outliers that fit the model.
LADDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("W4A4, one scale a token and a channel", PLAIN),
    ("+ outliers in 16 bits", PLAIN | {"outliers": "fit", "outlier_bits": 16, "reorder": True}),
    ("+ outliers in 8 bits", PLAIN | {"outliers": "fit", "reorder": True}),
    ("+ groups", {"method": "rtn", "weight_clip": 1.0, "activation_clip": 1.0}),
    ("+ clipping", {"method": "rtn"}),
    ("+ GPTQ (atom-w4a4)", {}),
)
CACHES = (
    (Cache(8), "INT8 KV alone"),
    (Cache(4), "INT4 KV alone"),
    (Cache(4, before_rope=True), "INT4 KV alone, keys before RoPE"),
)


@dataclass
class Subject:
    """A model, plain and quantized in every way, judged on the same windows of one text.

    Attributes:
      judged, calibration: token ids, int32 [n].
      made: what was quantized by a mode's own constants, by mode.
    """

    name: str
    text: str
    config: ModelConfig
    model: Decoder
    judged: np.ndarray
    calibration: np.ndarray
    window: int
    made: dict[str, tuple[ModelConfig, Decoder]] = field(default_factory=dict)

    def __post_init__(self):
        self.made = {"none": (self.config, self.model)}

    def full(self) -> dict[str, Any]:
        return self._row("full precision", self.config, self.model)

    def ladder(self) -> Iterator[dict[str, Any]]:
        for step, chosen in LADDER:
            yield self.quantized(step, "atom-w4a4", chosen)
        yield self._row("+ INT4 KV", *self.made["atom-w4a4"], cache=Cache(4))

    def modes(self) -> Iterator[dict[str, Any]]:
        for cache, step in CACHES:
            yield self._row(step, self.config, self.model, cache=cache)
        yield self.quantized("atom-w4a8", "atom-w4a8", {})
        for bits in (8, 4):
            yield self._row(f"atom-w4a8, INT{bits} KV", *self.made["atom-w4a8"], cache=Cache(bits))
        yield self.quantized("atom-w4a8 rotated", "atom-w4a8", {"rotate": True})
        for mode in ("w8a8", "w4a16"):
            yield self.quantized(mode, mode, {})

    def quantized(self, step: str, mode: str, chosen: dict[str, Any]) -> dict[str, Any]:
        fit = quantization(mode, self.config).outliers
        form = quantization(mode, self.config, **{k: fit if v == "fit" else v for k, v in chosen.items()})
        text = windows(
            self.calibration, dataclasses.replace(form, length=self.window), self.config.context_length
        )
        config, made, reports = quantize_model(self.model, self.config, form, text)
        if not chosen:
            self.made[mode] = config, made
        shares = [report.matrices[0].outlier_share for report in reports]
        row = self._row(step, config, made) | {"drift": reports[-1].drift, "group": form.group}
        return row | {"outliers": form.outliers, "outlier_energy": float(np.mean(shares))}

    def _row(self, step: str, config: ModelConfig, model: Decoder, cache: Cache = AS_IT_IS) -> dict[str, Any]:
        judged = self.judged[: len(self.judged) // self.window * self.window].reshape(-1, self.window)
        found = perplexity(config, model, judged, cache)
        return {"weights": self.name, "text": self.text, "step": step, "perplexity": found}


def size_ratio(model: Decoder) -> float:
    """Bytes of the packed linear layers over those of bfloat16."""
    layers = [layer for run in model.runs for layer in run]
    packed = [a for l in layers for a in (l.attention.qkv, l.attention.out, l.mlp.gate_up, l.mlp.down)]
    return sum(a.nbytes for a in packed) / sum(2 * a.size for a in packed)
