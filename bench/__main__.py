"""The bench command: runs one benchmark, prints its table, writes its result."""

from __future__ import annotations

import argparse
import importlib
import sys

from bench.result import Result

BENCHES = {
    "atom-matmul": "low-bit matmuls against plain ones, by mode, shape and rows, and against the floor of their bytes",
    "atom-perplexity": "what every step of Atom, every mode and every KV type cost in likelihood and answers",
    "atom-serving": "a whole model of random weights, quantized and not, side by side through the engine",
    "batch": "rows/s and memory of a million rows around a model that takes no time, and what the journal costs",
    "blendserve-sim": "BlendServe simulated: gain over depth-first order, share of the optimum, ranks, planner",
    "blendserve-engine": "the schedule policies on the real engine: same answers, throughput, sharing, step mix",
    "engine": "tokens/s, steps, compilations, padding and host share of the engine, on this machine's own limits",
    "fiddler-host": "the expert kernel of the host against the rates of memory and of matmul, and against numpy",
    "fiddler-offload": "experts four times the device: tokens/s, first token, hit rate, link and host, by policy and batch",
    "fiddler-placement": "slots by Fiddler's rule, hit rates of placements on the published popularity of Mixtral's experts",
    "h200": "the benches that want a GPU, in one call of under ten minutes",
    "kernels": "every page kernel of this platform against its XLA twin: equal, how much faster, of the byte floor",
    "overlap": "attention of a mixed step: prefill alone, decode alone, both in one launch, against max + 0.3 min",
    "peers": "the same batch through jaxinfer and through transformers, side by side",
    "pocket": "accuracy of the pocket model by task and length, likelihood of held-out stories, load of its experts",
    "scale-sim": "8 to 1,024 simulated workers and 10 million requests on the driver's own code, with failures and stragglers",
    "steps": "whole steps compiled for an H200 without one: kernels, loops and choices that make the host wait, memory",
    "quest-attention": "estimate, select and attend against dense attention, by context, budget and batch",
    "quest-accuracy": "what Quest's selections, and evictions on the same budget, keep of the pocket model's answers",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "name", choices=BENCHES, metavar="NAME", help="; ".join(f"{k}: {v}" for k, v in BENCHES.items())
    )
    parser.add_argument("--quick", action="store_true", help="a small version, for a look; not for quoting")
    parser.add_argument(
        "--json", metavar="FILE", help="where the result goes; bench/results/DEVICE/NAME.json otherwise"
    )
    known, rest = parser.parse_known_args(argv)
    module = importlib.import_module(f"bench.{known.name.replace('-', '_')}")
    result: Result = module.run(quick=known.quick, options=rest)
    result.print()
    print(f"\n{result.write(known.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
