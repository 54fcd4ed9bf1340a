"""What the engine counts while it runs, and what it last looked like."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jaxinfer.schedule.demand import Demand

LEVELS = {"peak_pages", "pages", "pages_in_use", "pages_kept", "running"}


@dataclass
class Metrics:
    """Plain counters from the start of the engine, and gauges: what is so at the latest call.

    Attributes:
      steps: forward passes (a call of several decode steps counts each).
      calls: device calls.
      prompt_tokens: tokens of all prompts, once per choice.
      cached_tokens: those of them whose keys were found in the cache.
      generated_tokens: tokens of answers.
      computed_tokens: tokens that went through the model.
      prefill_tokens: those of them that were known before, such as a prompt's; the others were sampled one step before.
      padding_tokens: padding that went through it beside them.
      flops: operations that the calls asked for, as `schedule.DemandModel` counts them; padding asks for none.
      bytes: weights, keys and values that the calls had to move.
      kv_bytes: keys and values among them.
      copied_pages: KV pages copied because a beam had to write to one that other beams had too.
      peak_pages: most KV pages taken at once, kept prefixes among them.
      pages: KV pages of the pool.
      pages_in_use: gauge, those that running sequences hold.
      pages_kept: gauge, those that hold prefixes for requests to come.
      running: gauge, sequences that run.
      preemptions: sequences that had to give back their pages and start again.
      shrinks: times that the device ran out of memory and steps were made smaller.
      compilations: programs compiled (or taken from the persistent cache) for new shapes.
      plan_seconds: host time in planning and building batches.
      launch_seconds: host time in handing calls to the device.
      wait_seconds: host time waiting for the device.
      update_seconds: host time in advancing sequences: stop rules, text.
      run_seconds: wall time with work at hand.
    """

    steps: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    prefill_tokens: int = 0
    padding_tokens: int = 0
    flops: int = 0
    bytes: int = 0
    kv_bytes: int = 0
    copied_pages: int = 0
    peak_pages: int = 0
    pages: int = 0
    pages_in_use: int = 0
    pages_kept: int = 0
    running: int = 0
    preemptions: int = 0
    shrinks: int = 0
    compilations: int = 0
    plan_seconds: float = 0.0
    launch_seconds: float = 0.0
    wait_seconds: float = 0.0
    update_seconds: float = 0.0
    run_seconds: float = 0.0

    def count(self, demand: Demand) -> None:
        self.flops += demand.flops
        self.bytes += demand.bytes
        self.kv_bytes += demand.kv_bytes

    def as_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def since(self, before: Metrics) -> Metrics:
        """The counts between `before`, a copy made earlier, and now; peaks and gauges are those of now."""
        now: dict[str, Any] = self.as_dict()
        then = before.as_dict()
        return Metrics(
            **{name: value if name in LEVELS else value - then[name] for name, value in now.items()}
        )
