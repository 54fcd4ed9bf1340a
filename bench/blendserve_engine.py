"""The schedule policies on the real engine of this machine: same file, same answers, throughput, sharing, and the mix of steps."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import workloads
from bench.pocket.items import held_out_stories
from bench.result import ROOT, Result, device_name
from bench.ties import widest_tie
from jaxinfer.batch.svg import Axis, lines
from jaxinfer.config import load_config
from jaxinfer.core import Request
from jaxinfer.engine.apart import Apart
from jaxinfer.engine.blend import Blend
from jaxinfer.engine.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.schedule.workload import POLICIES, Sharing, Workload

SETTINGS = (
    "model.dtype=float32",  # answers are compared token by token
    "engine.max_seqs=16",
    "engine.max_tokens_per_step=128",
    "cache.pages=512",
)  # six prefixes do not fit beside 16 rows
_STYLE = "<style>polyline{fill:none;stroke-width:1.2}.c0{stroke:#888}.c1{stroke:#17a}.c2{stroke:#c40}.tick{stroke:#ddd}</style>"


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench blendserve-engine")
    parser.add_argument("--policy", choices=[*POLICIES, "blend"], action="append")
    parser.add_argument("--rows", type=int, default=40 if quick else 128)
    parser.add_argument("--repeats", type=int, default=1 if quick else 5)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    known = parser.parse_args(options)
    policies = known.policy or ["fcfs", "dfs", "blend"]
    settings = load_config(None, [*SETTINGS, *known.set])
    result = Result("blendserve-engine", dataclasses.asdict(settings) | {"quick": quick, "rows": known.rows})
    models = {
        policy: LLM(config=load_config(None, [*SETTINGS, *known.set, f"schedule.policy={policy}"]))
        for policy in policies
    }
    engines = {policy: model.engine for policy, model in models.items()}
    tokenizer = models[policies[0]].tokenizer
    assert tokenizer is not None, "the embedded model has a tokenizer"
    text = [token for story in held_out_stories(40) for token in tokenizer.encode(story)]
    jobs = workloads.mixed(known.rows, text=text)
    requests = workloads.requests(jobs)
    answers = {
        policy: serve(engine, requests, policy)[1] for policy, engine in engines.items()
    }  # and compile
    told = [{policy: found[request.id] for policy, found in answers.items()} for request in requests]
    ties = [widest_tie(engines[policies[0]], *each) for each in zip(requests, told)]
    differ = sum(len(set(each.values())) > 1 for each in told)
    runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
    for _ in range(known.repeats):
        for (
            policy,
            engine,
        ) in engines.items():  # side by side, so that what else the machine does hits all alike
            runs[policy].append(serve(engine, requests, policy)[0])
    tokens = sum(len(job.prompt) + job.answer for job in jobs)
    for policy, rows in runs.items():
        middle = sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2]
        row = {name: value for name, value in middle.items() if name != "mix"}
        result.rows.append({"policy": policy, "tokens_per_s": tokens / middle["seconds"]} | row)
    wall, cpu = (
        {policy: statistics.median(row[name] for row in rows) for policy, rows in runs.items()}
        for name in ("seconds", "cpu_seconds")
    )
    share = {row["policy"]: row["cached_share"] for row in result.rows}
    result.summary = {f"cached_share_{policy.replace('-', '_')}": value for policy, value in share.items()}
    result.summary |= {"answers_that_differ": float(differ), "widest_tie": max(ties)}
    last = policies[-1]
    for policy in policies[:-1]:
        name = f"{last}_over_{policy}".replace("-", "_")
        result.summary |= {name: wall[policy] / wall[last], f"{name}_cpu": cpu[policy] / cpu[last]}
    _plot({policy: rows[0]["mix"] for policy, rows in runs.items()})
    return result


def serve(engine: Engine, requests: list[Request], policy: str) -> tuple[dict[str, Any], dict[str, tuple]]:
    """One run from an empty prefix cache: its figures, and every answer's tokens."""
    engine.forget_prefixes()
    before, start, cpu = copy.copy(engine.metrics), time.perf_counter(), time.process_time()
    planned, given = _requests(engine, requests, policy)
    mix: list[tuple[float, int, int]] = []
    answers = {}
    for out in engine.run(given, planned):
        assert out.error is None, out.error
        answers[out.request_id] = out.token_ids
        now = engine.metrics.since(before)
        mix.append((time.perf_counter() - start, now.prefill_tokens, now.computed_tokens))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    counts = engine.metrics.since(before)
    host = counts.plan_seconds + counts.launch_seconds + counts.update_seconds
    figures = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "steps": counts.steps,
        "calls": counts.calls,
        "cached_share": counts.cached_tokens / counts.prompt_tokens,
        "computed_tokens": counts.computed_tokens,
        "padding_share": counts.padding_tokens / (counts.padding_tokens + counts.computed_tokens),
        "weight_gib": (counts.bytes - counts.kv_bytes) / 2**30,
        "preemptions": counts.preemptions,
        "host_share": host / seconds,
        "plan_share": counts.plan_seconds / seconds,
        "mix": mix,
    }
    return figures, answers


def _requests(
    engine: Engine, requests: list[Request], policy: str
) -> tuple[Blend | Apart | None, Iterator[Request]]:
    lengths = np.array([len(request.prompt_ids) for request in requests])
    limits = np.array([request.sampling.max_tokens for request in requests], np.int64)
    workload = Workload(
        tokens=np.concatenate([request.prompt_ids for request in requests]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        answer_limits=limits,
        answer_floors=limits,  # the batch forces them
    )
    sharing = Sharing.of(workload, engine.settings.cache.page_size)
    if policy != "blend":
        return None, (requests[index] for index in POLICIES[policy](sharing))
    plan = engine.blend(workload, sharing)

    def in_turn() -> Iterator[Request]:
        for index in plan.indices():
            plan.expects(requests[index].id, index)
            yield requests[index]

    return plan, in_turn()


def _plot(mixes: dict[str, list[tuple[float, int, int]]], points: int = 40) -> Path:
    """Prefill tokens among those that go through the model, over time."""
    curves = []
    for policy, mix in mixes.items():
        at = np.array([(0.0, 0, 0), *mix])
        times = np.linspace(0, at[-1, 0], points + 1)
        prefill, computed = (np.interp(times, at[:, 0], at[:, column]) for column in (1, 2))
        share = np.diff(prefill) / np.maximum(np.diff(computed), 1)
        curves.append((policy, [(float(t), 100 * float(s)) for t, s in zip(times[1:], share)]))
    chart = lines(curves, Axis(unit="% prefill among computed tokens", top=100.0))
    file = ROOT / "bench" / "results" / device_name() / "blendserve-engine.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"<!doctype html><title>Step mix by policy</title>{_STYLE}{chart}\n")
    return file
