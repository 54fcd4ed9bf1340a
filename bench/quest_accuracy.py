"""`python -m bench quest-accuracy`: what Quest's selections and what evictions keep of the pocket model's answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.dense_decoder import DenseDecoder, Forget, keep_all, sliding_window, tova
from bench.pocket.evaluate import answers, size_of
from bench.pocket.items import Item, held_out_stories, items
from bench.result import Result
from jaxinfer.attention.quest import QuestPolicy, select
from jaxinfer.config import load_config
from jaxinfer.llm import EMBEDDED_MODEL, LLM
from jaxinfer.models.checkpoint import load_model
from pallas_kernels.page_bounds import make_bounds, page_bounds
from pallas_kernels.page_scores import page_scores

CASES = (("passkey", 4096), ("passkey", 8192), ("lines", 2048), ("lines", 4096))
SHARES = (8, 4, 16)  # the budget is the context over one of these; the first is quoted
QUOTED = 8
NLL_BUDGETS = (256, 512, 1024)
TAIL = 48  # tokens: the question goes through the sparse path, as in the paper
PAGE = 16
QUEST = {"ours": "shared", "paper": "paper", "kernel": "kernel"}
ANSWER = 24  # tokens of a baseline's answer
TOP = 10  # keys whose recall is counted


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench quest-accuracy")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="converted folder")
    parser.add_argument("--items", type=int, default=20 if quick else 100, help="of a task and length")
    parser.add_argument("--baseline-items", type=int, default=10 if quick else 50)
    parser.add_argument(
        "--shares", type=int, nargs="+", default=SHARES, help="budgets: the context over these"
    )
    parser.add_argument("--methods", nargs="+", choices=QUEST, default=list(QUEST))
    known = parser.parse_args(options)
    settings = {"items": known.items, "baseline_items": known.baseline_items, "tail": TAIL, "quick": quick}
    result = Result("quest-accuracy", settings)
    rows: list[dict[str, Any]] = [{"task": task, "context": context} for task, context in CASES]
    for method, share in [("dense", 1), *((m, s) for m in known.methods for s in known.shares)]:
        for row in rows:
            row |= _answered(known.model, row["task"], row["context"], method, share, known.items)
            print(row, flush=True)
    for row in rows:
        row |= _baselines(known.model, row["task"], row["context"], known.shares, known.baseline_items)
        print(row, flush=True)
    result.rows = rows
    for row in rows:
        name = f"{row['task']}_{row['context']}"
        result.summary[f"{name}_dense"] = row["dense"]
        for method in (*known.methods, "window", "tova"):
            result.summary[f"{name}_{method}"] = row[f"{method}_{known.shares[0]}"]
    dense = result.summary["nll_dense"] = nll(known.model, "dense", 0)
    for method in known.methods:
        for budget in NLL_BUDGETS[1:2] if quick else NLL_BUDGETS:
            result.summary[f"nll_ratio_{method}_{budget}"] = nll(known.model, method, budget) / dense
    result.summary["recall_top10"] = recall(known.model, 10 if quick else 40)
    return result


def _model(path: str, method: str, budget: int, more: tuple[str, ...] = ()) -> LLM:
    chosen = [f"cache.page_size={PAGE}", *more]
    if method != "dense":
        tail = f"sparsity.prompt_tail={TAIL}"
        chosen = [f"sparsity.token_budget={budget}", f"sparsity.mode={QUEST[method]}", tail, *chosen]
    return LLM(path, config=load_config(None, chosen))


def _answered(path: str, task: str, context: int, method: str, share: int, count: int) -> dict[str, float]:
    """Share of right answers through the engine."""
    llm = _model(path, method, context // share)
    asked = items(task, context, size_of(llm), count)
    name = "dense" if method == "dense" else f"{method}_{share}"
    return {name: _share_right(asked, answers(llm, asked))}


def _share_right(asked: list[Item], texts: list[str]) -> float:
    return float(np.mean([item.is_right(text) for item, text in zip(asked, texts)]))


def _baselines(path: str, task: str, context: int, shares: Sequence[int], count: int) -> dict[str, float]:
    """The same questions under evictions, one sequence at a time over plain arrays; dense again, to hold both ways together."""
    llm = LLM(path)
    assert llm.tokenizer is not None
    asked = items(task, context, size_of(llm), count)
    config, weights = load_model(path, dtype="float32", layout="unstacked")
    decoder = DenseDecoder(config, weights, context)
    ways: dict[str, Forget] = {"dense_arrays": keep_all}
    for share in shares:
        ways |= {f"window_{share}": sliding_window(context // share, sinks=4)}
        ways |= {f"tova_{share}": tova(context // share)}
    texts: dict[str, list[str]] = {name: [] for name in ways}
    for item in asked:
        ids = np.asarray(_prompt(llm, item), np.int32)
        start = len(ids) - TAIL - 1
        kept = decoder.prefill(ids[: start + 1])
        for name, forget in ways.items():
            out = decoder.decode(kept, start, ids[start:], ANSWER, forget)
            end = next((i for i, token in enumerate(out) if token in config.eos_ids), len(out))
            texts[name].append(llm.tokenizer.decode(out[:end]))
    return {name: _share_right(asked, said) for name, said in texts.items()}


def _prompt(llm: LLM, item: Item) -> list[int]:
    assert llm.tokenizer is not None
    if item.chat:
        return list(llm.tokenizer.chat([{"role": "user", "content": item.prompt}]))
    return list(llm.tokenizer.encode(item.prompt))


def nll(path: str, method: str, budget: int) -> float:
    """Mean negative log-likelihood of held-out stories laid end to end to 4,096 tokens; the second half goes token by token."""
    more = () if method == "dense" else ("sparsity.prompt_tail=2048",)
    llm = _model(path, method, budget, more)
    assert llm.tokenizer is not None
    encode, texts = llm.tokenizer.encode, held_out_stories(200)
    whole = [token for text in texts for token in encode(text)]
    pieces = [whole[start : start + 4096] for start in range(0, len(whole) - 4095, 4096)]
    return -float(np.mean([scores[2048:].mean() for scores in llm.score(pieces)]))


@dataclass(frozen=True)
class _Recall:
    """Counts how many of a token's strongest keys lie in the pages that a policy chooses."""

    policy: QuestPolicy

    def of(self, q: jax.Array, keys: jax.Array, length: int) -> float:
        """q [Hq, D], keys [T, Hkv, D], of which `length` are real."""
        tokens, heads, dim = keys.shape
        pages = tokens // PAGE
        bounds = make_bounds((1, pages, heads, dim), self.policy.bounds_type("float32"))
        slots = jnp.where(jnp.arange(tokens) < length, jnp.arange(tokens), -1)
        bounds = page_bounds(bounds, 0, keys, slots, page_size=PAGE)
        table, lengths = jnp.arange(pages, dtype=jnp.int32)[None], jnp.asarray([length], jnp.int32)
        scores = page_scores(q[None], bounds, 0, table, lengths, page_size=PAGE)
        chosen = select(self.policy, scores, table, lengths, kv_heads=heads, scale=dim**-0.5)
        exact = np.einsum("kgd,tkd->kgt", np.asarray(q).reshape(heads, -1, dim), np.asarray(keys)[:length])
        hits = []
        for head in range(heads):
            listed = set(np.asarray(chosen.positions[0, head, : int(chosen.number[0, head])]).tolist())
            for row in exact[head]:
                hits += [int(key) // PAGE in listed for key in np.argsort(-row)[:TOP]]
        return float(np.mean(hits))


def recall(path: str, count: int) -> float:
    """Share of the 10 strongest keys of the last prompt token that our default finds at 1/8 of 4,096 tokens: sparse layers, all heads."""
    llm = LLM(path)
    asked = items("passkey", 4096, size_of(llm), count)
    config, weights = load_model(path, dtype="float32", layout="unstacked")
    policy = QuestPolicy(token_budget=4096 // QUOTED, page_size=PAGE)
    decoder, counted = DenseDecoder(config, weights, 4096), _Recall(policy)
    shares: list[Any] = []
    for item in asked:
        ids = np.asarray(_prompt(llm, item), np.int32)
        for layer, (q, keys) in enumerate(decoder.looks(ids)):
            if layer >= policy.dense_layers:
                shares.append(counted.of(q, keys, len(ids)))
    return float(np.mean(shares))
