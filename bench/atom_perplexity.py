"""`python -m bench atom-perplexity`: what every step of Atom, every mode and every KV type cost a model in likelihood and answers."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.pocket import tasks
from bench.pocket.items import Item, items
from bench.pocket.words import Source
from bench.result import Result
from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models import forward, logits
from jaxinfer.models.checkpoint import load_model
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder
from jaxinfer.models.tokenizer import Tokenizer
from jaxinfer.quant.calibrate import LayerReport, attend_causally
from jaxinfer.quant.form import quantization
from jaxinfer.quant.model import quantize_model
from jaxinfer.quant.text import windows
from pallas_kernels.packed_pages import pack, unpack

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
PLANTED = 40.0  # how far the planted channels stick out
PLANTED_CHANNELS = 4  # of each norm
CALIBRATION_TOKENS, WINDOW = 8 * 1024, 512
TASKS = (("passkey", 1024), ("lines", 512), ("classify", 512), ("table", 512))


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench atom-perplexity")
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="converted folder, not quantized")
    parser.add_argument("--text", type=Path, help="file to be judged on; held-out stories otherwise")
    parser.add_argument(
        "--calibration", type=Path, help="text to calibrate on; stories of training otherwise"
    )
    parser.add_argument(
        "--windows", type=int, default=16 if quick else 48, help="of 512 tokens, to be judged on"
    )
    parser.add_argument("--items", type=int, default=20 if quick else 100, help="of each task; 0: no tasks")
    parser.add_argument("--part", action="append", choices=("ladder", "modes", "planted", "tasks"))
    known = parser.parse_args(options)
    tokenizer = Tokenizer(known.model)
    config, model = load_model(known.model, dtype="float32", layout="unstacked")
    judged = _stream(known.text, tokenizer, unseen=True, tokens=known.windows * WINDOW)
    calibration = _stream(known.calibration, tokenizer, unseen=False, tokens=CALIBRATION_TOKENS)
    bench = _Bench(config, model, judged[: len(judged) // WINDOW * WINDOW].reshape(-1, WINDOW), calibration)
    chosen = {name: getattr(known, name) for name in ("windows", "items")}
    result = Result("atom-perplexity", chosen | {"window": WINDOW, "model": known.model.name, "quick": quick})
    parts = known.part or ["ladder", "modes", "planted", "tasks"]
    for row in bench.rows(parts):
        result.rows.append(row)
        print(row, flush=True)
    result.summary = _summary(result.rows, bench)
    if "tasks" in parts and known.items and known.text is None:
        for row in bench.accuracies(tokenizer, known.items):
            result.rows.append(row)
            print(row, flush=True)
            result.summary[f"accuracy_{row['step']}"] = row["accuracy"]
    return result


def _stream(path: Path | None, tokenizer: Tokenizer, *, unseen: bool, tokens: int) -> np.ndarray:
    """Token ids of a file, or of stories of the model's own world one after another."""
    if path is not None:
        return np.asarray(tokenizer.encode(path.read_text(encoding="utf-8")), np.int32)[:tokens]
    ids: list[int] = []
    while len(ids) < tokens:
        source = Source(random.Random(f"atom {unseen} {len(ids)}"), unseen=unseen)
        ids += tokenizer.encode(tasks.plain(source, 300, len).context)
    return np.asarray(ids[:tokens], np.int32)


class _Bench:
    """One model, plain and quantized in every way, judged on the same windows."""

    def __init__(self, config: ModelConfig, model: Decoder, judged: np.ndarray, calibration: np.ndarray):
        self.config, self.model, self.judged, self.calibration = config, model, judged, calibration
        self.made: dict[str, tuple[ModelConfig, Decoder]] = {"none": (config, model)}
        self.size_ratio = math.nan

    def rows(self, parts: list[str]) -> Iterator[dict[str, Any]]:
        full = self._row("model", "full precision", self.config, self.model)
        yield full
        for kind, model in (("model", self.model), ("planted", _with_planted_outliers(self.model))):
            if kind == "planted" and "planted" in parts:
                yield self._row(kind, "full precision", self.config, model)
            if ("ladder" if kind == "model" else kind) in parts:
                for name, chosen in LADDER:
                    yield self._quantized(kind, name, model, "atom-w4a4", chosen)
        if "modes" not in parts:
            return
        if "atom-w4a4" in self.made:
            yield self._row("model", "+ INT4 KV", *self.made["atom-w4a4"], kv=4)
        yield self._quantized("model", "atom-w4a8", self.model, "atom-w4a8", {})
        for kv in (8, 4):
            yield self._row("model", f"atom-w4a8, INT{kv} KV", *self.made["atom-w4a8"], kv=kv)
        others: tuple[tuple[str, dict[str, Any]], ...] = (
            ("w8a8", {}),
            ("atom-w4a8", {"rotate": True}),
            ("w4a16", {}),
        )
        for mode, chosen in others:
            yield self._quantized("model", mode + (" rotated" if chosen else ""), self.model, mode, chosen)

    def _quantized(
        self, kind: str, name: str, model: Decoder, mode: str, chosen: dict[str, Any]
    ) -> dict[str, Any]:
        fit = quantization(mode, self.config).outliers
        form = quantization(mode, self.config, **{k: fit if v == "fit" else v for k, v in chosen.items()})
        text = windows(self.calibration, dataclasses.replace(form, length=WINDOW), self.config.context_length)
        config, made, reports = quantize_model(model, self.config, form, text)
        if kind == "model" and not chosen:
            self.made[mode] = config, made
            if mode == "atom-w4a4":
                self.size_ratio = _size_ratio(made)
        return self._row(kind, name, config, made, reports)

    def _row(
        self,
        kind: str,
        name: str,
        config: ModelConfig,
        model: Decoder,
        reports: list[LayerReport] | None = None,
        kv: int = 0,
    ) -> dict[str, Any]:
        row = {"weights": kind, "step": name, "perplexity": perplexity(config, model, self.judged, kv)}
        form = config.quantization
        if form is not None:
            row |= {"group": form.group, "outliers": form.outliers}
        if reports:
            shares = [r.matrices[0].outlier_share for r in reports]
            row |= {"drift": reports[-1].drift, "outlier_energy": float(np.mean(shares))}
        return row

    def accuracies(self, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, Any]]:
        """Share of questions whose answer is the greedy one, token by token; of each task, and over all."""
        size = functools.partial(_size, tokenizer)
        asked = {task: [_ids(tokenizer, i) for i in items(*task, size, count)] for task in TASKS}
        for name, mode, kv in (("full", "none", 0), ("w4a4", "atom-w4a4", 4), ("w4a8_kv4", "atom-w4a8", 4)):
            if mode not in self.made:
                self._quantized("model", mode, self.model, mode, {})
            right = {
                f"{task} {length}": greedy_share(*self.made[mode], asked[task, length], length, kv)
                for task, length in TASKS
            }
            yield {"weights": "model", "step": name, "accuracy": float(np.mean(list(right.values())))} | right


def _size(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text)) - len(tokenizer.encode(""))


def _ids(tokenizer: Tokenizer, item: Item) -> tuple[list[int], list[int]]:
    """Prompt and answer, as the engine reads and writes them."""
    if item.chat:
        prompt = list(tokenizer.chat([{"role": "user", "content": item.prompt}]))
    else:
        prompt = list(tokenizer.encode(item.prompt))
    answer = tokenizer.encode(" " + item.answer.strip())[len(tokenizer.encode("")) :]
    return prompt, list(answer)


def greedy_share(
    config: ModelConfig, model: Decoder, asked: list[tuple[list[int], list[int]]], length: int, kv: int
) -> float:
    """Share of answers that greedy decoding gives: every token the likeliest after those before it."""
    likeliest = jax.jit(lambda model, ids: _logits(config, model, ids, kv).argmax(-1))
    right = 0
    for prompt, answer in asked:
        ids = np.zeros(length, np.int32)
        both = (prompt + answer)[:length]
        ids[: len(both)] = both
        said = np.asarray(likeliest(model, ids))[len(prompt) - 1 : len(both) - 1]
        right += bool((said == both[len(prompt) :]).all())
    return right / len(asked)


def _logits(config: ModelConfig, model: Decoder, ids: jax.Array, kv: int) -> jax.Array:
    """Of one window by itself. ids [T] -> float32 [T, V]; kv: bits of keys and values, 0 leaves them."""

    def attend(cache, layer, q, k, v, window):
        if kv:
            k, v = (unpack(*pack(x, kv), kv) for x in (k, v))
        return attend_causally(cache, layer, q, k, v, window)

    length = len(ids)
    hidden, _ = forward(model, config, ids, jnp.arange(length), jnp.full(length, length), attend, None)
    return logits(model, config, hidden)


def perplexity(config: ModelConfig, model: Decoder, judged: np.ndarray, kv: int = 0) -> float:
    """Of windows that do not overlap, each by itself: exp of the mean negative log-likelihood. kv: bits of keys and values."""

    @jax.jit
    def total(model: Decoder, ids: jax.Array) -> jax.Array:
        every = jax.nn.log_softmax(_logits(config, model, ids, kv))
        return -jnp.take_along_axis(every[:-1], ids[1:, None], axis=1).sum()

    return math.exp(sum(float(total(model, ids)) for ids in judged) / (judged.size - len(judged)))


def _with_planted_outliers(model: Decoder) -> Decoder:
    """The same function with channels that stick out: a norm's channel scaled up, the weights behind it scaled down."""
    planted = jax.tree.map(lambda leaf: leaf, model)
    for index, layer in enumerate(layer for run in planted.runs for layer in run):
        wide = layer.attn_norm.scale.shape[0]
        channels = np.random.default_rng(index).choice(wide, PLANTED_CHANNELS, replace=False)
        factor = np.ones(wide, np.float32)
        factor[channels] = PLANTED
        layer.attn_norm.scale = nnx.data(layer.attn_norm.scale * factor)
        layer.attention.qkv = nnx.data(layer.attention.qkv / factor[:, None, None, None])
        layer.mlp_norm.scale = nnx.data(layer.mlp_norm.scale * factor)
        layer.mlp.gate_up = nnx.data(layer.mlp.gate_up / factor[:, None, None])
        if hasattr(layer.mlp, "router"):
            layer.mlp.router = nnx.data(layer.mlp.router / factor[:, None])
    return planted


def _size_ratio(model: Decoder) -> float:
    """Bytes of the packed linear layers over those of bfloat16."""
    layers = [layer for run in model.runs for layer in run]
    packed = [a for l in layers for a in (l.attention.qkv, l.attention.out, l.mlp.gate_up, l.mlp.down)]
    return sum(a.nbytes for a in packed) / sum(2 * a.size for a in packed)


def _summary(rows: list[dict[str, Any]], bench: _Bench) -> dict[str, float]:
    names = {
        "full precision": "ppl_full",
        LADDER[0][0]: "ppl_w4a4_rtn",
        LADDER[-1][0]: "ppl_w4a4",
        "+ INT4 KV": "ppl_w4a4_kv4",
        "atom-w4a8": "ppl_w4a8",
        "atom-w4a8, INT4 KV": "ppl_w4a8_kv4",
    }
    found = {
        names[r["step"]]: r["perplexity"] for r in rows if r["weights"] == "model" and r["step"] in names
    }
    planted = {
        f"planted_{names[r['step']]}": r["perplexity"]
        for r in rows
        if r["weights"] == "planted" and r["step"] in names
    }
    return found | planted | {"size_ratio": bench.size_ratio}
