"""Whole steps of Llama-3-8B each way, for `bench.overlap`: the table by which the engine would choose, and what a batch gains by it.

On a GPU the engine measures the table. Elsewhere it is predicted, layer by layer, from the predictions of the other parts; how
independent chains would run is not predicted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench import overlap_attention, overlap_product
from bench.blendserve_sim import FOUR, mixed
from bench.hopper import BANDWIDTH, OF_PEAK_PRODUCTS, PEAK
from bench.overlap_product import GATE_UP, HIDDEN, Pair
from bench.simulated import MODELS
from bench.traces import BURSTGPT
from jaxinfer.schedule.profile import SUM
from jaxinfer.schedule.step_times import StepTimes, Timing, Way
from pallas_kernels.hybrid_attention.shapes import MixedShape
from pallas_kernels.hybrid_matmul.shapes import Beside
from pallas_kernels.int4_matmul.shapes import LowBitShape
from pallas_kernels.page_attention.shapes import ListShape

LAYERS, VOCABULARY = 32, 128_256
CONTEXTS = (64, 2048, 8192)
SIZES = [(tokens, first) for tokens in (512, 1024, 2048, 4096) for first in (128, 512) if tokens >= 3 * first]
SETTING = MODELS["llama-3-8b on h200"]


def predicted() -> StepTimes:
    """Seconds of steps whose first nano-batch is full, the rest of them one chunk of a prompt from its beginning."""
    timings = []
    for tokens, first in SIZES:
        ways: dict[Way, list[float]] = {Way.WHOLE: [], Way.ATTENTION: [], Way.PRODUCT: []}
        for context in CONTEXTS:
            for way, seconds in _layer(tokens - first, first, context).items():
                ways[way].append(LAYERS * seconds + _head(first + 1))
        keys = tuple(float(first * context) for context in CONTEXTS)
        timings += [Timing(way, tokens, first, keys, tuple(seconds)) for way, seconds in ways.items()]
    return StepTimes(tuple(timings))


def _layer(prefill: int, decodes: int, context: int) -> dict[Way, float]:
    pair = Pair(
        Beside(LowBitShape(prefill, HIDDEN, GATE_UP), ListShape(32, 8, 128, 16, (context,) * decodes, 1)),
        low_bits=False,
    )
    product, memory, beside = overlap_product.predicted(pair)
    around = overlap_product.around(pair, product)
    attention = MixedShape(32, 8, 128, 16, ((prefill, prefill),), (context,) * decodes)
    prompts, _, together = overlap_attention.predicted(attention)
    rest = around["rest"]
    return {
        Way.WHOLE: rest + product + prompts + memory,
        Way.ATTENTION: rest + product + together,
        Way.PRODUCT: rest + prompts + beside + around["again"],
    }


def _head(rows: int) -> float:
    size = VOCABULARY * HIDDEN
    return max(2 * rows * size / (OF_PEAK_PRODUCTS * PEAK), 2 * size / BANDWIDTH)


def rows(times: StepTimes) -> list[dict[str, Any]]:
    """Of every measured step: seconds each way, and the gain of the fastest."""
    found = []
    plain = [each for each in times.timings if each.way is Way.WHOLE]
    for each in plain:
        alike = [other for other in times.timings if other[1:3] == each[1:3]]
        for keys in each.keys:
            seconds = {other.way.value: other.at(keys) for other in alike}
            size = {"tokens": each.tokens, "decodes": each.decodes, "keys": keys}
            gain = seconds[Way.WHOLE.value] / min(seconds.values())
            found.append({"part": "steps"} | size | seconds | {"step_gain": gain})
    return found


def batches(times: StepTimes, requests: int) -> list[dict[str, Any]]:
    """The paper's four traces simulated on an H200 whose compute and memory take the table's time together: throughput of `blend`
    over that of depth-first order in the same engine, and over its own without any overlap."""
    found = []
    for number, (density, share) in FOUR.items():
        case = mixed(BURSTGPT, density, share, replace(SETTING, joint=times.joint), total=requests)
        dfs, ours = (case.serve(policy) for policy in ("dfs", "ours"))
        found.append(
            {
                "part": "batches",
                "trace": number,
                "blend_over_dfs": dfs.seconds / ours.seconds,
                "overlap_gain": ours.under(SUM, times.joint).seconds / ours.seconds,
                "of_optimum": case.optimum / ours.seconds,
            }
        )
    return found
