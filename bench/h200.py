"""`python -m bench h200`: everything that wants measuring on a GPU, in one call of under ten minutes, most telling first."""

from __future__ import annotations

import argparse
import importlib
import os
import time
import traceback

import jax

from bench.result import Result

PARTS = {  # in this order: is it right, how fast alone, how fast together
    "kernels": [],
    "quest-attention": [],
    "overlap": [],
    "engine": [],
    "fiddler-offload": ["--model", "mixtral-8x7b-int4", "--repeats", "1"],
    "pocket": ["--items", "20"],
}
SECONDS = 540.0


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench h200")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no part begins after these")
    parser.add_argument("--only", action="append", choices=PARTS, help="again for more")
    parser.add_argument("--folder", help="where the parts' results go; beside this one otherwise")
    known = parser.parse_args(options)
    result = Result("h200", {"backend": jax.default_backend(), "quick": quick})
    began = time.perf_counter()
    for name in known.only or PARTS:
        row = {"part": name, "outcome": "no time left", "seconds": 0.0}
        result.rows.append(row)
        started = time.perf_counter()
        if started - began > known.seconds:
            continue
        print(f"== {name}", flush=True)
        try:
            module = importlib.import_module(f"bench.{name.replace('-', '_')}")
            part: Result = module.run(quick=quick, options=PARTS[name])
        except Exception as error:  # the other parts go on: device time is short
            traceback.print_exc()
            row["outcome"] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        else:
            part.print()
            part.write(os.path.join(known.folder, f"{name}.json") if known.folder else None)
            row["outcome"] = "done"
            result.summary |= {f"{name}.{key}": value for key, value in part.summary.items()}
        row["seconds"] = time.perf_counter() - started
    result.summary["failed"] = sum(row["outcome"] != "done" for row in result.rows)
    return result
