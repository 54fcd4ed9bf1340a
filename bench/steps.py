"""Whole steps of the engine compiled for an H200, on a machine without one: which kernels they call, where the host would wait.

A process each, because a failing compiler may end its own. Run it in the environment of `make h200`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from bench.result import ROOT, Result

QUEST = ["sparsity.token_budget=2048"]
# By name: weights, settings, and the way of mixed steps.
CASES: dict[str, tuple[str, list[str], str]] = {
    "bf16": ("bfloat16", [], "whole"),
    "bf16, one attention": ("bfloat16", [], "attention"),
    "bf16, in two": ("bfloat16", [], "product"),
    "bf16, quest, in two": ("bfloat16", QUEST, "product"),
    "int8 cache": ("bfloat16", ["cache.dtype=int8"], "whole"),
    "int4 cache": ("bfloat16", ["cache.dtype=int4"], "whole"),
    "int4 cache, one attention": ("bfloat16", ["cache.dtype=int4"], "attention"),
    "quest": ("bfloat16", QUEST, "whole"),
    "atom-w4a8, int4 cache, quest": ("atom-w4a8", ["cache.dtype=int4", *QUEST], "whole"),
    "atom-w4a8, int4 cache, in two": ("atom-w4a8", ["cache.dtype=int4"], "product"),
    "atom-w4a4, int4 cache": ("atom-w4a4", ["cache.dtype=int4"], "whole"),
    "w4a16": ("w4a16", [], "whole"),
    "w8a8": ("w8a8", [], "whole"),
}
STEPS = ("mixed", "decode")
MODELS = ("llama-3-8b", "mixtral-8x7b")


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench steps")
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--model", action="append", choices=MODELS)
    known = parser.parse_args(options)
    result = Result("steps", {"layers": 4, "quick": quick}, device="compiled-for-h200")
    for name in known.case or list(CASES)[:: 3 if quick else 1]:
        for model in known.model or MODELS:
            for step in STEPS:
                way = CASES[name][2]
                if (way != "whole" and step == "decode") or (way == "product" and model != "llama-3-8b"):
                    continue  # no such step
                row = {"model": model, "case": name, "step": step} | _compiled(model, step, *CASES[name])
                result.rows.append(row)
                print(row, flush=True)
    rows = result.rows
    result.summary = {
        "failed": sum("failed" in row for row in rows),
        "with loops of unknown length": sum(row.get("loops of unknown length", 0) > 0 for row in rows),
        "with operations without a kernel": sum(bool(row.get("without a kernel")) for row in rows),
    }
    return result


def _compiled(model: str, step: str, weights: str, settings: list[str], way: str) -> dict[str, Any]:
    asked = json.dumps({"model": model, "weights": weights, "step": step, "settings": settings, "way": way})
    command = [sys.executable, "-m", "bench.one_step", asked]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
    found = json.loads(done.stdout.splitlines()[-1])
    kernels = ", ".join(f"{kernel} {count}" for kernel, count in found["kernels"].items())
    return found | {"kernels": kernels, "without a kernel": "; ".join(found["without a kernel"])}
