"""A fleet simulated: the driver's units and dispatcher feed 8 to 1,024 workers that die, come back, and differ in speed.

Llama-3-8B on an A100 a worker, true lengths of answers known. `efficiency` is what one worker takes for the whole batch, over the seconds
that the workers had until the last row; `of_optimum` has the practical optimum in its place.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import numpy as np

from bench.blendserve_sim import FOUR
from bench.result import Result
from bench.simulated import LLAMA_8B, PAGE
from bench.simulated_fleet import NONE, SimulatedFleet, Trouble
from bench.traces import BURSTGPT, MMLU, OPENVID, build, solve
from jaxinfer.scaleout.units import Units
from jaxinfer.schedule.plan import make_plan
from jaxinfer.schedule.simulate import compiled, practical_optimum
from jaxinfer.schedule.tree import RequestTree
from jaxinfer.schedule.workload import Sharing

UNITS = 4  # a worker
TROUBLED = Trouble(between_failures=4 * 3600.0, slow=0.05, between_changes=600.0)
_HASTY = Trouble(between_failures=60.0, start_seconds=5.0, slow=0.05, between_changes=30.0)


def run(*, quick: bool, options: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="python -m bench scale-sim")
    parser.add_argument("--requests", type=int, default=2_000 if quick else 10_000_000)
    parser.add_argument("--workers", type=int, action="append", help="may be repeated; 4, 8, 64 and 1,024")
    parser.add_argument("--trace", type=int, choices=FOUR, action="append", help="only these mixes")
    known = parser.parse_args(options)
    counts = known.workers or ([2, 4] if quick else [4, 8, 64, 1024])
    settings = {"quick": quick, "requests": known.requests, "setting": LLAMA_8B.describe()}
    result = Result("scale-sim", settings)
    for number in known.trace or FOUR:
        batch = Batch(number, known.requests, quick)
        alone = batch.served(1, NONE)
        for count in counts:
            for trouble in (NONE, batch.trouble):
                result.rows.append(
                    {"trace": number} | batch.row(alone, batch.served(count, trouble), trouble)
                )
        if number == (known.trace or list(FOUR))[0]:
            result.summary |= batch.driver
    result.summary |= summary(result.rows)
    return result


class Batch:
    """One of BlendServe's four mixes, planned as a driver plans it.

    Attributes:
      driver: seconds of its planning, and the process's most memory by then.
    """

    def __init__(self, number: int, requests: int, quick: bool):
        density, share = FOUR[number]
        parts = solve(BURSTGPT, OPENVID, MMLU, density=density, share=share, total=requests)
        mix = build(parts, written=False)
        self.outputs, self.cost = np.maximum(mix.outputs, 1), LLAMA_8B.cost
        self.trouble = _HASTY if quick else TROUBLED
        self._make = _plain if quick else compiled
        start = time.perf_counter()
        self._sharing = Sharing.of(mix.workload, PAGE)
        shared = time.perf_counter()
        self.tree = RequestTree.shared(mix.workload, self._sharing, PAGE)
        self.plan = make_plan(self.tree, self.cost, self.outputs)
        planned = time.perf_counter()
        self._cut(1024)
        self.driver = {
            "sharing_seconds": shared - start,
            "plan_seconds": planned - shared,
            "cut_seconds_1024": time.perf_counter() - planned,
            "driver_gib_10m" if requests == 10**7 else "driver_gib": resource.getrusage(
                resource.RUSAGE_SELF
            ).ru_maxrss
            / 2**20,
        }
        self.optimum = practical_optimum(self.tree, self.outputs, self.cost)

    def _cut(self, workers: int) -> Units:
        outputs, count = self.outputs.astype(float), UNITS * workers
        return Units.cut(self.plan, self.cost, outputs, count, self._sharing, turns=UNITS)

    def served(self, workers: int, trouble: Trouble) -> SimulatedFleet:
        fleet = SimulatedFleet(
            self._cut(workers), self.tree, self.outputs, LLAMA_8B, workers, trouble, self._make
        )
        fleet.run()
        assert fleet.finished + fleet.accused == len(self.outputs), "rows were lost for good"
        return fleet

    def row(self, alone: SimulatedFleet, fleet: SimulatedFleet, trouble: Trouble) -> dict[str, Any]:
        prompt, rows = int(self.tree.prompt.sum()), len(self.outputs)
        work = self.cost.compute(prompt + self.outputs.sum())
        work += self.cost.memory(self.tree.prompt, self.outputs).sum()
        return {
            "requests": rows,
            "workers": len(fleet.ends),
            "troubled": trouble is not NONE,
            "seconds": fleet.seconds,
            "efficiency": alone.seconds / fleet.capacity,
            "of_optimum": self.optimum / fleet.capacity,
            "slowest_over_mean": fleet.seconds / float(fleet.ends.mean()),
            "longest_answer_s": float(self.outputs.max() * self.cost.step_seconds),
            "sharing": (prompt - fleet.prefilled) / (prompt - alone.prefilled),
            "failures": fleet.failures,
            "lost_rows": fleet.lost_rows / rows,
            "lost_work": fleet.lost_seconds / work,
            "accused": fleet.accused,
            "stolen": fleet.dispatcher.stolen / rows,
            "rows_a_turn": rows / fleet.turns,
            "turn_us": 1e6 * fleet.turn_seconds / fleet.turns,
        }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The worst of all mixes."""
    found: dict[str, float] = {}
    for count in dict.fromkeys(row["workers"] for row in rows):
        clean = [row for row in rows if row["workers"] == count and not row["troubled"]]
        troubled = [row for row in rows if row["workers"] == count and row["troubled"]]
        found |= {
            f"efficiency_{count}": min(row["efficiency"] for row in troubled),
            f"efficiency_{count}_untroubled": min(row["efficiency"] for row in clean),
            f"slowest_over_mean_{count}": max(row["slowest_over_mean"] for row in clean),
            f"sharing_{count}": min(row["sharing"] for row in clean),
            f"lost_work_{count}": max(row["lost_work"] for row in troubled),
        }
    return found | {"turn_us": max(row["turn_us"] for row in rows)}


def _plain(kind: type, *given: Any) -> Any:
    return kind(*given)
