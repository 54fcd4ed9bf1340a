"""`python -m bench atom-perplexity`: what every step of Atom, every mode and every KV type cost a model in likelihood and answers."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.atom_subject import LADDER, Subject, size_ratio
from bench.golden import golden_models
from bench.likelihood import AS_IT_IS, Cache, greedy_share
from bench.pocket import tasks
from bench.pocket.items import Item, items
from bench.pocket.words import Source
from bench.result import Result
from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models.checkpoint import load_model
from jaxinfer.models.layers import Decoder
from jaxinfer.models.tokenizer import Tokenizer

PLANTED = 40.0  # how far the planted channels stick out
PLANTED_CHANNELS = 4  # of each norm
CALIBRATION_TOKENS, WINDOW = 16 * 1024, 512
TASKS = (("passkey", 1024), ("lines", 512), ("classify", 512), ("table", 512))
# Of the whole model: what answers are asked of, by the name in `accuracy_...`.
ANSWERING = (("full", "none", AS_IT_IS), ("w4a4", "atom-w4a4", Cache(4)), ("w4a8_kv4", "atom-w4a8", Cache(4)))
PARTS = ("ladder", "modes", "planted", "golden", "tasks")


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench atom-perplexity")
    parser.add_argument(
        "--windows", type=int, default=12 if quick else 48, help="of 512 tokens, to be judged on"
    )
    parser.add_argument("--items", type=int, default=20 if quick else 100, help="of each task")
    parser.add_argument("--part", action="append", choices=PARTS)
    known = parser.parse_args(options)
    settings = {"windows": known.windows, "items": known.items, "window": WINDOW}
    result = Result("atom-perplexity", settings | {"calibration": CALIBRATION_TOKENS, "quick": quick})
    parts = known.part or list(PARTS)
    tokenizer = Tokenizer(EMBEDDED_MODEL)
    config, model = load_model(EMBEDDED_MODEL, dtype="float32", layout="unstacked")
    judged = _stories(tokenizer, unseen=True, tokens=known.windows * WINDOW)
    calibration = _stories(tokenizer, unseen=False, tokens=CALIBRATION_TOKENS)
    pocket = Subject("pocket", "stories", config, model, judged, calibration, WINDOW)
    for row in _rows(parts, pocket, known.windows):
        result.rows.append(row)
        print(row, flush=True)
    result.summary = _summary(result.rows, pocket)
    if "tasks" in parts:
        for row in _accuracies(pocket, tokenizer, known.items):
            result.rows.append(row)
            print(row, flush=True)
            result.summary[f"accuracy_{row['step']}"] = row["accuracy"]
    return result


def _stories(tokenizer: Tokenizer, *, unseen: bool, tokens: int) -> np.ndarray:
    """Token ids of stories of the model's own world, one after another."""
    ids: list[int] = []
    while len(ids) < tokens:
        source = Source(random.Random(f"atom {unseen} {len(ids)}"), unseen=unseen)
        ids += tokenizer.encode(tasks.plain(source, 300, len).context)
    return np.asarray(ids[:tokens], np.int32)


def _rows(parts: list[str], pocket: Subject, count: int) -> Iterator[dict[str, Any]]:
    yield pocket.full()
    if "ladder" in parts:
        yield from pocket.ladder()
    if "modes" in parts:
        yield from pocket.modes()
    if "planted" in parts:
        planted = dataclasses.replace(
            pocket, name="planted", model=_with_planted_outliers(pocket.model), made={}
        )
        yield planted.full()
        yield from planted.ladder()
    for golden in golden_models() if "golden" in parts else ():
        window = min(WINDOW, golden.config.context_length)
        judged = golden.judged[: count * window]
        calibration = golden.calibration[:CALIBRATION_TOKENS]
        subject = Subject(golden.name, golden.text, golden.config, golden.model, judged, calibration, window)
        yield subject.full()
        yield from subject.ladder()
        yield from subject.modes()


def _accuracies(subject: Subject, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, Any]]:
    """Share of questions whose answer is the greedy one, token by token; of each task, and over all."""
    size = functools.partial(_size, tokenizer)
    asked = {task: [_ids(tokenizer, i) for i in items(*task, size, count)] for task in TASKS}
    for name, mode, cache in ANSWERING:
        if mode not in subject.made:
            subject.quantized(mode, mode, {})
        right = {
            f"{task} {length}": greedy_share(*subject.made[mode], asked[task, length], length, cache)
            for task, length in TASKS
        }
        yield {
            "weights": subject.name,
            "step": name,
            "accuracy": float(np.mean(list(right.values()))),
        } | right


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


def _summary(rows: list[dict[str, Any]], subject: Subject) -> dict[str, float]:
    names = {
        "full precision": "ppl_full",
        LADDER[0][0]: "ppl_w4a4_rtn",
        LADDER[-1][0]: "ppl_w4a4",
        "+ INT4 KV": "ppl_w4a4_kv4",
        "atom-w4a8": "ppl_w4a8",
        "atom-w4a8, INT4 KV": "ppl_w4a8_kv4",
    }
    prefixes = {"pocket": "", "planted": "planted_"}
    found = {
        prefixes[row["weights"]] + names[row["step"]]: row["perplexity"]
        for row in rows
        if row["weights"] in prefixes and row["step"] in names
    }
    made = subject.made.get("atom-w4a4")
    return found | ({"size_ratio": size_ratio(made[1])} if made else {})
