"""Slots by Fiddler's rule and hit rates of the placements on its authors' popularity counts of Mixtral-8x7B."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from bench.result import ROOT, Result
from jaxinfer.models.config import ModelConfig, MoEConfig, RopeConfig
from jaxinfer.offload.budget import paper_slots
from jaxinfer.offload.placement import by_layer, by_popularity, hit_rate, read_popularity

COUNTS = ROOT.parent / "shared" / "data" / "traces" / "mixtral_expert_popularity.json"
MIXTRAL = ModelConfig(
    family="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp_width=14336,
    context_length=32768,
    rope=RopeConfig(theta=1e6, dim=128),
    moe=MoEConfig(experts=8, experts_per_token=2, width=14336),
)
MODEL = ("model", "mixtral_8x7b_original")
DEVICES = {"24gib": 24_576, "48gib": 49_140}  # MiB, as the paper's two cards report
RANDOM_PLACEMENTS = 1000


def run(quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench fiddler-placement")
    parser.add_argument(
        "--counts", type=Path, default=COUNTS, help="JSON with counts of every layer and expert"
    )
    path = parser.parse_args(options).counts
    counts = read_popularity(path, 32, 8, within=MODEL)
    result = Result("fiddler-placement", {"counts": path.name, "model": MODEL[-1]})
    rng = np.random.default_rng(0)
    for name, mib in DEVICES.items():
        slots = paper_slots(MIXTRAL, mib * 2**20)
        random = [
            hit_rate(counts, by_popularity(rng.random(counts.shape), slots))
            for _ in range(RANDOM_PLACEMENTS // (10 if quick else 1))
        ]
        rates = {
            "popularity": hit_rate(counts, by_popularity(counts, slots)),
            "by layer": hit_rate(counts, by_layer(counts, slots)),
            "random, mean": float(np.mean(random)),
            "worst": hit_rate(counts, by_popularity(-counts, slots)),
        }
        result.rows.append({"device": f"{mib} MiB", "slots": slots} | rates)
        result.summary[f"slots_{name}"] = slots
        result.summary[f"hit_{name}"] = rates["popularity"]
        result.summary[f"hit_{name}_random"] = rates["random, mean"]
    return result
