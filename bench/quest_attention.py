"""`python -m bench quest-attention`: estimate, select and attend against dense attention, by context, budget and batch."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.machine import memory_bandwidth
from bench.result import Result
from jaxinfer.attention import Chosen, QuestPolicy, Selection, select, select_again
from jaxinfer.config import load_config
from jaxinfer.core import SamplingParams
from jaxinfer.llm import LLM
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_scores import page_scores

PAGE = 16
REPEATS = 5
MODELS = {"llama2-7b": (32, 32, 128), "llama3-8b": (32, 8, 128)}  # query heads, KV heads, channels of a head
GPU_GRID = [(context, batch) for context in (8192, 32768, 131072) for batch in (1, 8, 32)]
CPU_GRID = [(8192, 1), (32768, 1), (8192, 4)]
BUDGETS = (512, 1024, 2048, 4096)
REUSE = 4  # steps that a choice serves in the column `speedup_reuse`
QUOTED = ("llama2-7b", 32768, 2048)
MOST_BYTES = {"cpu": 3 << 30, "gpu": 100 << 30}  # of one layer's keys and values


@dataclass(frozen=True)
class Case:
    """Decode attention of one layer: `batch` rows of `context` tokens each."""

    model: str
    context: int
    batch: int

    @property
    def heads(self) -> tuple[int, int, int]:
        return MODELS[self.model]

    def dense_bytes(self, size: int) -> int:
        """Of all keys and values."""
        _, kv_heads, dim = self.heads
        return 2 * self.batch * self.context * kv_heads * dim * size

    def sparse_bytes(self, budget: int, size: int) -> int:
        """Bounds of all pages, keys and values of the chosen ones."""
        _, kv_heads, dim = self.heads
        return 2 * self.batch * (self.context // PAGE + budget) * kv_heads * dim * size


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench quest-attention")
    parser.add_argument("--model", default=None, help="of the end-to-end ratio; the embedded one if left out")
    known = parser.parse_args(options)
    backend = jax.default_backend()
    dtype = jnp.float32 if backend == "cpu" else jnp.bfloat16
    result = Result("quest-attention", {"dtype": str(jnp.dtype(dtype)), "page_size": PAGE, "quick": quick})
    bandwidth = memory_bandwidth()
    result.settings["memory_bandwidth"] = bandwidth
    for case in _cases(backend, quick, jnp.dtype(dtype).itemsize):
        for row in _measured(case, dtype, bandwidth):
            result.rows.append(row)
            print(row, flush=True)
    quoted = [row for row in result.rows if (row["model"], row["context"], row["budget"]) == QUOTED]
    for row in quoted:
        suffix = "" if row["batch"] == 1 else f"_batch_{row['batch']}"
        result.summary[f"speedup_32k_2048{suffix}"] = row["speedup"]
        result.summary[f"of_byte_floor{suffix}"] = row["of_byte_floor"]
        result.summary[f"speedup_32k_2048_reuse{suffix}"] = row["speedup_reuse"]
    result.summary["speedup_e2e_8k"] = end_to_end(known.model, quick)
    return result


def _cases(backend: str, quick: bool, size: int) -> list[Case]:
    grid = GPU_GRID if backend == "gpu" else CPU_GRID
    cases = [Case(model, *shape) for model in MODELS for shape in (grid[:2] if quick else grid)]
    return [case for case in cases if case.dense_bytes(size) <= MOST_BYTES.get(backend, MOST_BYTES["cpu"])]


class _Layer(NamedTuple):
    """One layer's pool, and rows whose pages lie anywhere in it."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    bounds: jax.Array
    table: jax.Array
    lengths: jax.Array

    @classmethod
    def random(cls, case: Case, dtype) -> _Layer:
        q_heads, kv_heads, dim = case.heads
        pages = case.batch * case.context // PAGE + 1
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (1, pages, kv_heads, PAGE, dim)
        k_pages, v_pages = (jax.random.normal(key, shape, dtype) for key in keys[:2])
        q = jax.random.normal(keys[2], (case.batch, q_heads, dim), dtype)
        bounds = jnp.stack([k_pages.min(3), k_pages.max(3)], axis=3)
        order = np.random.default_rng(0).permutation(pages - 1) + 1
        table = jnp.asarray(order.reshape(case.batch, -1), jnp.int32)
        return cls(q, k_pages, v_pages, bounds, table, jnp.full(case.batch, case.context, jnp.int32))

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def dense(self) -> jax.Array:
        lists = (self.table[:, None], self.lengths[:, None])
        return page_attention(self.q, self.k_pages, self.v_pages, 0, *lists, scale=self.scale)

    def estimate(self) -> jax.Array:
        return page_scores(self.q, self.bounds, 0, self.table, self.lengths, page_size=PAGE)

    def choose(self, policy: QuestPolicy, scores: jax.Array) -> Selection:
        kv_heads = self.k_pages.shape[2]
        return select(policy, scores, self.table, self.lengths, kv_heads=kv_heads, scale=self.scale)

    def attend(self, chosen: Selection) -> jax.Array:
        lists = (chosen.page_lists, chosen.tokens)
        return page_attention(self.q, self.k_pages, self.v_pages, 0, *lists, scale=self.scale)

    def sparse(self, policy: QuestPolicy) -> jax.Array:
        return self.attend(self.choose(policy, self.estimate()))

    def sparse_again(self, policy: QuestPolicy, before: Chosen) -> jax.Array:
        """A step that reuses an earlier choice."""
        return self.attend(select_again(policy, before, self.table, self.lengths))


def _measured(case: Case, dtype, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row per budget. Seconds are medians; dense and sparse are measured in turn."""
    layer = _Layer.random(case, dtype)
    dense, estimate, attend = jax.jit(_Layer.dense), jax.jit(_Layer.estimate), jax.jit(_Layer.attend)
    choose, sparse, sparse_again = (
        jax.jit(call, static_argnums=1) for call in (_Layer.choose, _Layer.sparse, _Layer.sparse_again)
    )
    scores = estimate(layer)
    for budget in BUDGETS:
        policy = QuestPolicy(token_budget=budget, page_size=PAGE, reuse_steps=REUSE)
        chosen = choose(layer, policy, scores)
        seconds = _in_turn(
            {
                "dense": partial(dense, layer),
                "sparse": partial(sparse, layer, policy),
                "again": partial(sparse_again, layer, policy, Chosen(chosen.positions, chosen.number)),
                "estimate": partial(estimate, layer),
                "select": partial(choose, layer, policy, scores),
                "attend": partial(attend, layer, chosen),
            }
        )
        floor = case.sparse_bytes(budget, jnp.dtype(dtype).itemsize) / bandwidth
        yield (
            {"model": case.model, "context": case.context, "batch": case.batch, "budget": budget}
            | {f"{name}_us": 1e6 * value for name, value in seconds.items()}
            | {"speedup": seconds["dense"] / seconds["sparse"], "of_byte_floor": seconds["sparse"] / floor}
            | {"speedup_reuse": seconds["dense"] / _mean_of_reuse(seconds)}
        )


def _mean_of_reuse(seconds: dict[str, float]) -> float:
    """Of a step in which one of REUSE chooses anew."""
    return (seconds["sparse"] + (REUSE - 1) * seconds["again"]) / REUSE


def _in_turn(calls: dict[str, Callable]) -> dict[str, float]:
    """Median seconds of each call, all measured in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(REPEATS):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in times.items()}


def end_to_end(model: str | None, quick: bool) -> float:
    """Decode of eight rows of nearly 8,192 tokens through the whole model, dense over a budget of 1,024: median of five ratios."""
    answer, rows = (32, 2) if quick else (128, 8)
    llms = [
        LLM(model, config=load_config(None, [f"sparsity.token_budget={b}", "engine.max_seqs=8"]))
        for b in (0, 1024)
    ]
    context = llms[0].engine.memory.context
    random = np.random.default_rng(0)
    vocabulary = llms[0].engine.config.vocab_size
    length = min(8192, context) - answer
    prompts = [random.integers(3, vocabulary, length).tolist() for _ in range(rows)]
    sampling = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    ratios = []
    for _ in range(REPEATS + 1):
        seconds = []
        for llm in llms:
            started = time.perf_counter()
            list(
                llm.generate(prompts, sampling)
            )  # all prompts but their last page come from the prefix cache
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first fills the caches
