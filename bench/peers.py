"""The mixed batch through jaxinfer and through transformers' generate in length-sorted static batches of 16."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import machine, workloads
from bench.engine import drain, make_engine, measure_once
from bench.result import ROOT, Result
from jaxinfer.config import load_config

PEER_SCRIPT = Path(__file__).parent / "peers_transformers.py"
HOW = """no environment with torch and transformers: make one,
  python3 -m venv .venv-peers && .venv-peers/bin/pip install torch transformers
or name the Python of an existing one with --python or JAXINFER_PEER_PYTHON"""


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench peers")
    parser.add_argument("--python", default=os.environ.get("JAXINFER_PEER_PYTHON"))
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each, in turn; the medians are compared"
    )
    parser.add_argument("--model", choices=workloads.MODELS, action="append")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    known = parser.parse_args(options)
    python = known.python or str(ROOT / ".venv-peers" / "bin" / "python")
    if not Path(python).exists():
        sys.exit(HOW)
    settings = load_config(None, known.set)
    result = Result("peers", dataclasses.asdict(settings) | {"quick": quick})
    rate = machine.matmul_rate()
    for name in known.model or workloads.MODELS:
        config = workloads.MODELS[name]
        jobs = workloads.mixed(16 if quick else 64, vocabulary=config.vocab_size)
        engine = make_engine(config, settings)
        drain(engine, jobs)
        ours, theirs = [], []
        for _ in range(known.repeats):
            ours.append(measure_once(engine, jobs))
            theirs.append(_transformers(python, name, jobs))
        tokens = sum(len(job.prompt) + job.answer for job in jobs)
        mine = statistics.median(row["seconds"] for row in ours)
        peer = statistics.median(row["seconds"] for row in theirs)
        limit = ours[0]["flops"] / rate
        result.rows += [
            {
                "model": name,
                "engine": "jaxinfer",
                "seconds": mine,
                "tokens_per_s": tokens / mine,
                "of_matmul_limit": limit / mine,
            },
            {
                "model": name,
                "engine": "transformers",
                "seconds": peer,
                "tokens_per_s": tokens / peer,
                "of_matmul_limit": limit / peer,
            },
        ]
        key = "" if name == "llama-110m" else f"_{name.split('-')[0]}"
        result.summary[f"vs_transformers{key}"] = peer / mine
        result.summary[f"of_matmul_limit{key}"] = limit / mine
        result.summary[f"of_torch_matmul_limit{key}"] = ours[0]["flops"] / theirs[0]["matmul_rate"] / mine
    result.summary["matmul_gflops"] = rate / 1e9
    return result


def _transformers(python: str, name: str, jobs: list[workloads.Job]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"model": name, "jobs": [[job.prompt, job.answer] for job in jobs]}, file)
        file.flush()
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [python, str(PEER_SCRIPT), file.name], capture_output=True, text=True, env=environment
        )
    if done.returncode:
        sys.exit(f"transformers failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
