"""Small models that others trained, with text: what is in `../shared/data`, where that exists."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx

from bench.result import ROOT
from convert.convert import convert
from jaxinfer.models.checkpoint import load_model
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder
from jaxinfer.models.tokenizer import Tokenizer

DATA = ROOT.parent / "shared" / "data"
MODELS = ("stories260K", "babyllama105", "babyllama105-moe")
CHANNELS = 16  # the smallest group
# By name: text to calibrate on and text to be judged on; a share of the file each where both are one.
TEXTS = {
    "tinystories": (("tinystories_197k.txt", 0.0, 0.5), ("tinystories_197k.txt", 0.5, 1.0)),
    "wikitext2": (("wikitext2_valid.txt", 0.0, 0.3), ("wikitext2_test.txt", 0.0, 0.3)),
}


@dataclasses.dataclass(frozen=True)
class Golden:
    """A model with token ids of a text. calibration, judged: int32 [n]."""

    name: str
    text: str
    config: ModelConfig
    model: Decoder
    calibration: np.ndarray
    judged: np.ndarray


def golden_models() -> Iterator[Golden]:
    """Every model on every text; none where there is no data."""
    for name in MODELS if DATA.exists() else ():
        with tempfile.TemporaryDirectory() as folder:
            convert(DATA / "checkpoints" / name, f"{folder}/model", dtype="float32")
            config, model = widened(*load_model(f"{folder}/model", dtype="float32", layout="unstacked"))
            tokenizer = Tokenizer(Path(folder) / "model")
            for text, places in TEXTS.items():
                calibration, judged = (_ids(tokenizer, *place) for place in places)
                yield Golden(name, text, config, model, calibration, judged)


def _ids(tokenizer: Tokenizer, file: str, begin: float, end: float) -> np.ndarray:
    text = (DATA / "text" / file).read_text(encoding="utf-8")
    return np.asarray(tokenizer.encode(text[int(begin * len(text)) : int(end * len(text))]), np.int32)


def widened(config: ModelConfig, model: Decoder) -> tuple[ModelConfig, Decoder]:
    """The same function where the width of a dense MLP is no multiple of 16: channels of zeros are added to it."""
    more = -config.mlp_width % CHANNELS
    if config.moe is not None or not more:
        return config, model
    for layer in (layer for run in model.runs for layer in run):
        layer.mlp.gate_up = nnx.data(np.pad(layer.mlp.gate_up, ((0, 0), (0, 0), (0, more))))
        layer.mlp.down = nnx.data(np.pad(layer.mlp.down, ((0, more), (0, 0))))
    return dataclasses.replace(config, mlp_width=config.mlp_width + more), model
