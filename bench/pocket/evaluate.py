"""`python -m bench pocket`: accuracy by task and length, likelihood of held-out stories, load of the experts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.pocket import items as fixed
from bench.pocket import network
from bench.pocket.items import CASES, COUNT, Item, held_out_stories, items
from bench.result import Result
from jaxinfer.config import load_config
from jaxinfer.core import SamplingParams
from jaxinfer.llm import EMBEDDED_MODEL, LLM
from jaxinfer.models.checkpoint import load_model

GREEDY = SamplingParams(temperature=0, max_tokens=fixed.ANSWER - 8)
STORIES = 200
LOAD_ITEMS = 8  # of each task and length
LOAD_LENGTH = (
    512  # tokens: longer prompts are cut, shorter ones repeated; routing depends little on the length
)


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench pocket")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="converted folder")
    parser.add_argument("--items", type=int, default=50 if quick else COUNT, help="of a task and length")
    parser.add_argument("--only", action="append", help="task, or task_length; again for more")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    known = parser.parse_args(options)
    llm = LLM(known.model, config=load_config(None, known.set))
    settings = {"items": known.items, "version": fixed.VERSION, "model": llm.model_name, "quick": quick}
    result = Result("pocket", settings)
    for task, length in cases(known.only):
        row = accuracy(llm, task, length, known.items)
        result.rows.append(row)
        result.summary[f"{task.replace('-', '_')}_{length}"] = row["accuracy"]
        print(f"{task} {length}: {row['accuracy']:.3f}", flush=True)
    result.summary["heldout_nll"] = held_out_nll(llm, STORIES // (4 if quick else 1))
    load = expert_load(llm, known.model)
    result.settings["expert_load"] = np.round(load, 3).tolist()
    result.summary |= {"expert_load_min": float(load.min()), "expert_load_max": float(load.max())}
    return result


def cases(only: list[str] | None) -> list[tuple[str, int]]:
    every = [(task, length) for task, lengths in CASES.items() for length in lengths]
    return [c for c in every if not only or c[0] in only or f"{c[0]}_{c[1]}" in only]


def accuracy(llm: LLM, task: str, length: int, count: int) -> dict[str, Any]:
    """Share of right greedy answers, and for pass keys the worst depth."""
    asked = items(task, length, size_of(llm), count)
    right = [item.is_right(text) for item, text in zip(asked, answers(llm, asked))]
    row = {"task": task, "length": length, "items": len(asked), "accuracy": float(np.mean(right))}
    depths = {item.depth for item in asked if item.depth is not None}
    if depths:
        by_depth = {d: float(np.mean([r for r, i in zip(right, asked) if i.depth == d])) for d in depths}
        row |= {"worst_depth": min(by_depth, key=by_depth.__getitem__), "worst": min(by_depth.values())}
    return row


def size_of(llm: LLM):
    """Tokens of a text, without a beginning-of-sequence token."""
    assert llm.tokenizer is not None
    encode = llm.tokenizer.encode
    extra = len(encode(""))
    return lambda text: len(encode(text)) - extra


def answers(llm: LLM, asked: Iterable[Item]) -> list[str]:
    """Greedy answers, in order; an empty one for a request that failed."""
    asked = list(asked)
    talked = llm.chat([[{"role": "user", "content": i.prompt}] for i in asked if i.chat], GREEDY)
    completed = llm.generate([i.prompt for i in asked if not i.chat], GREEDY)
    chats, completions = (iter([out.text or "" for out in outs]) for outs in (talked, completed))
    return [next(chats if item.chat else completions) for item in asked]


def held_out_nll(llm: LLM, count: int) -> float:
    """Mean negative log-likelihood (natural) of a token of the held-out stories."""
    scores = llm.score(held_out_stories(count))
    return -float(np.mean(np.concatenate(scores)))


def expert_load(llm: LLM, model: str) -> np.ndarray:
    """Load of each expert in each layer over prompts of all tasks, times uniform: float [layers, experts]."""
    config, weights = load_model(model, dtype="float32", layout="unstacked")
    positions = jnp.arange(LOAD_LENGTH)[None]
    visits = jax.jit(lambda ids: network.forward(weights, config, ids[None], positions, 4.0)[3])
    assert llm.tokenizer is not None
    total = np.zeros((config.layers, config.moe.experts if config.moe else 1))
    for task, length in cases(None):
        for item in items(task, length, size_of(llm), LOAD_ITEMS):
            ids = llm.tokenizer.encode(item.prompt + item.answer)
            total += np.asarray(visits(jnp.resize(jnp.asarray(ids), (LOAD_LENGTH,))))
    return total / total.mean(axis=1, keepdims=True)
