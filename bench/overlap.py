"""`python -m bench overlap`: compute-bound and memory-bound work of a mixed step, each alone and both in one launch.

Prefill attention, or the product gate_up of prefill tokens, beside decode attention; then whole steps in each way that the engine
chooses from, and what a batch gains by that. On a GPU everything is measured. Elsewhere joint times are predictions from counted operations and bytes, and from the shares of an H200 that are written in
`bench.hopper` and beside the predictions; what the kernels take of a processor comes from the compiler, where it is installed.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np

from bench import overlap_attention, overlap_engine, overlap_product, overlap_steps
from bench.hopper import occupancy
from bench.result import Result
from jaxinfer.schedule.profile import Joint

GOOD = 0.3  # of the shorter time, on top of the longer one
USEFUL = 0.25  # the shorter time over the longer one, from which on overlap is worth having
PARTS: dict[str, Any] = {"attention": overlap_attention, "product": overlap_product}
STEPS = "steps"


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench overlap")
    parser.add_argument(
        "--pace", type=float, action="append", help="of a launch, again for more; the best counts"
    )
    parser.add_argument("--part", action="append", choices=[*PARTS, STEPS], help="only these")
    parser.add_argument(
        "--requests", type=int, default=20_000 if quick else 100_000, help="that are simulated"
    )
    known = parser.parse_args(options)
    parts = known.part or [*PARTS, STEPS]
    paces = known.pace or ([1.0] if quick else [1.0, 1.5, 3.0])
    on_gpu = jax.default_backend() == "gpu"
    result = Result("overlap", {"measured": on_gpu, "quick": quick, "paces": paces})
    for part in [part for part in parts if part != STEPS]:
        module = PARTS[part]
        for name, shape in module.mixes(quick).items():
            row: dict[str, Any] = {"part": part, "mix": name} | module.counted(shape)
            if on_gpu:
                row |= module.measured(shape, paces)
            else:
                row |= zip(("compute", "memory", "joint"), module.predicted(shape))
            row = module.around(shape, row["compute"]) | row | judged(row)
            row["layer_gain"] = gain(row)
            result.rows.append(row)
            print(row, flush=True)
    result.summary = {"measured": int(on_gpu)} | _summary(result.rows)
    if STEPS in parts:
        rows, summary = _steps(on_gpu, known.requests)
        result.rows += rows
        result.summary |= summary
    for part in [part for part in parts if part != STEPS]:
        for case in PARTS[part].COMPILED:
            name = case.split()[0] + ("_w4a8" if "w4a8" in case else "")
            result.summary |= {f"{name}_{key}": value for key, value in occupancy(case).items()}
    if not on_gpu:
        print("No GPU: joint times are predictions from counted work and assumed shares of an H200.")
    return result


def _steps(on_gpu: bool, requests: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Whole steps each way, and what a batch gains: measured by the engine, or simulated from predicted steps."""
    if on_gpu:
        measured, engine = overlap_engine.measured()
        assert measured is not None, "the engine measures its steps on a GPU"
        times, batches = measured, [engine]
    else:
        times = overlap_steps.predicted()
        batches = overlap_steps.batches(times, requests)
    rows = overlap_steps.rows(times)
    return rows + batches, {
        "e2e_gain": float(np.mean([row["blend_over_dfs"] for row in batches])),
        "e2e_gain_least": min(row["blend_over_dfs"] for row in batches),
        "e2e_overlap_gain": float(np.mean([row["overlap_gain"] for row in batches])),
        "step_gain_most": max(row["step_gain"] for row in rows),
        "step_joint_linear": times.joint.linear,
        "step_joint_square": times.joint.square,
    }


def judged(row: dict[str, Any]) -> dict[str, Any]:
    long, short = max(row["compute"], row["memory"]), min(row["compute"], row["memory"])
    return {"over_bound": row["joint"] / (long + GOOD * short), "useful": short >= USEFUL * long}


def gain(row: dict[str, Any]) -> float:
    """Of a layer's products and attention: one after the other over in one launch."""
    return (row["rest"] + row["compute"] + row["memory"]) / (row["rest"] + row["joint"] + row["again"])


def joint_of(rows: list[dict[str, Any]]) -> Joint:
    """Fitted to the rows of one part: not that of a `Cost`, whose compute is all of a step's."""
    return Joint.fit([(row["compute"], row["memory"], row["joint"]) for row in rows])


def _summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    useful = [row for row in rows if row["useful"]]
    summary = {"joint_over_bound": max(row["over_bound"] for row in useful)} if useful else {}
    for part in PARTS:
        mine = [row for row in useful if row["part"] == part]
        if mine:
            joint, gains = joint_of(mine), [row["layer_gain"] for row in rows if row["part"] == part]
            summary |= {
                f"{part}_over_bound_least": min(row["over_bound"] for row in mine),
                f"{part}_over_bound_most": max(row["over_bound"] for row in mine),
                f"{part}_joint_linear": joint.linear,
                f"{part}_joint_square": joint.square,
                f"{part}_layer_gain_most": max(gains),
                f"{part}_layer_gain_mean": float(np.mean(gains)),
            }
    return summary
