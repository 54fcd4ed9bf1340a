"""Batches ready to be simulated: a mix, its plan on a machine, and every policy's run of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bench.traces import Mix
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.lengths import Expected, expect, sample
from jaxinfer.schedule.partition import partition
from jaxinfer.schedule.plan import Plan, make_plan
from jaxinfer.schedule.profile import PRACTICAL, Joint
from jaxinfer.schedule.scanners import blend_scanner, fixed_scanner, paper_scanner
from jaxinfer.schedule.simulate import Outcome, compiled, practical_optimum, simulate
from jaxinfer.schedule.tree import RequestTree

PAGE = 16


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model on GPUs that act as one.

    Attributes:
      parameters, kv_width, layers: of the model; kv_width is all KV heads' channels.
      flops, bandwidth: peak, of all GPUs together.
      memory: bytes for keys and values.
      max_tokens: of a step.
      compute_share, bandwidth_share: of the peaks that are reached.
    """

    parameters: float
    kv_width: int
    layers: int
    flops: float = 312e12
    bandwidth: float = 2039e9
    memory: float = 60e9
    max_tokens: int = 1024
    compute_share: float = 0.75
    bandwidth_share: float = 0.85
    joint: Joint = field(default=PRACTICAL)

    @property
    def peak(self) -> Cost:
        """The paper's formulae at peak rates, by which densities of workloads are told."""
        return Cost.paper(
            parameters=self.parameters,
            kv_width=self.kv_width,
            layers=self.layers,
            flops=self.flops,
            bandwidth=self.bandwidth,
        )

    @property
    def cost(self) -> Cost:
        peak = self.peak
        return Cost(
            token_seconds=peak.token_seconds / self.compute_share,
            key_seconds=peak.key_seconds / self.bandwidth_share,
            step_seconds=2 * self.parameters / (self.bandwidth * self.bandwidth_share),
            joint=self.joint,
        )

    @property
    def capacity(self) -> int:
        """Tokens of the KV pool."""
        return int(self.memory / (4 * self.kv_width * self.layers))

    def describe(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "joint"} | {
            "joint": [self.joint.linear, self.joint.square]
        }


LLAMA_8B = Setting(parameters=8.03e9, kv_width=1024, layers=32)
_EIGHT: dict[str, Any] = {"flops": 8 * 312e12, "bandwidth": 8 * 2039e9, "max_tokens": 2048}
MODELS = {
    "llama-3-70b": Setting(parameters=70.6e9, kv_width=1024, layers=80, memory=460e9, **_EIGHT),
    "qwen2.5-7b": Setting(parameters=7.6e9, kv_width=512, layers=28),
    "llama-2-7b": Setting(parameters=6.7e9, kv_width=4096, layers=32),
    "qwen2.5-72b": Setting(parameters=72.7e9, kv_width=1024, layers=80, memory=460e9, **_EIGHT),
    "deepseek-67b": Setting(parameters=67e9, kv_width=1024, layers=95, memory=460e9, **_EIGHT),
    "llama-3-8b on h200": Setting(
        parameters=8.03e9,
        kv_width=1024,
        layers=32,
        flops=989e12,
        bandwidth=4800e9,
        memory=115e9,
        max_tokens=2048,
        compute_share=0.70,
    ),
}


class Case:
    """A mix with its tree and its plan for true lengths.

    Attributes:
      optimum: practical optimum, seconds.
      tokens: of prompts and answers.
    """

    def __init__(self, mix: Mix, setting: Setting):
        self.mix, self.setting, self.cost = mix, setting, setting.cost
        self.tree = RequestTree.of(mix.workload, PAGE)
        self.true = Expected.exact(mix.outputs)
        self.plan = make_plan(self.tree, self.cost, self.true.length)
        self.optimum = practical_optimum(self.tree, mix.outputs, self.cost)
        self.tokens = int(self.tree.prompt.sum() + mix.outputs.sum())

    def optimum_under(self, joint: Joint) -> float:
        """The practical optimum where both kinds of work take another time together."""
        return practical_optimum(self.tree, self.mix.outputs, replace(self.cost, joint=joint))

    def serve(self, policy: str, *, sampled: float = 0.0) -> Outcome:
        """Args:
        policy: dfs, random, paper or ours.
        sampled: share of the requests of unknown length that run first, to tell the others' lengths; 0 knows all.
        """
        if not sampled:
            return self._run(self._scanner(policy, self.plan, self.true))
        first = sample(~self.mix.known, sampled)
        order = self.plan.tree.by_arrival().order
        head = self._run(self._fixed(order[np.isin(order, first)], self.true))
        outputs = self.mix.outputs
        most = np.where(self.mix.known, outputs, outputs.max())
        least = np.where(self.mix.known, outputs, 1)
        fewest = 1 if policy == "paper" else 8
        expected = expect(self.tree, least, most, first, outputs[first], fewest=fewest)
        rest = np.ones(len(outputs), bool)
        rest[first] = False
        plan = make_plan(self.tree, self.cost, expected.length).only(rest)
        tail = self._run(self._scanner(policy, plan, expected))
        return tail._replace(seconds=head.seconds + tail.seconds)

    def serve_ranks(self, policy: str, count: int) -> list[Outcome]:
        parts = partition(self.plan, self.cost, self.mix.outputs, count)
        return [self._run(self._scanner(policy, part, self.true)) for part in parts]

    def _run(self, scanner: Any) -> Outcome:
        return simulate(scanner, self.tree, self.mix.outputs, self.cost, capacity=self.setting.capacity)

    def _fixed(self, order: np.ndarray, expected: Expected) -> Any:
        return fixed_scanner(order, self.tree.prompt, expected, make=compiled, **self._shape)

    @property
    def _shape(self) -> dict[str, int]:
        return {"capacity": self.setting.capacity, "max_tokens": self.setting.max_tokens}

    def _scanner(self, policy: str, plan: Plan, expected: Expected) -> Any:
        made: dict[str, Callable[[], Any]] = {
            "dfs": lambda: self._fixed(self.tree.by_arrival().order, expected),
            "random": lambda: self._fixed(np.random.default_rng(0).permutation(plan.order), expected),
            "paper": lambda: paper_scanner(plan, expected, make=compiled, **self._shape),
            "ours": lambda: blend_scanner(plan, expected, self.cost, make=compiled, **self._shape),
        }
        return made[policy]()
