"""What the engine counts while it runs."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Metrics:
    """Plain counters, all from the start of the engine.

    Attributes:
      steps: forward passes (a call of several decode steps counts each).
      calls: device calls.
      prompt_tokens: tokens of all prompts, once per choice.
      cached_tokens: those of them whose keys were found in the cache.
      generated_tokens: tokens of answers.
      computed_tokens: tokens that went through the model.
      padding_tokens: padding that went through it beside them.
      peak_pages: most KV pages in use at once.
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
    padding_tokens: int = 0
    peak_pages: int = 0
    preemptions: int = 0
    shrinks: int = 0
    compilations: int = 0
    plan_seconds: float = 0.0
    launch_seconds: float = 0.0
    wait_seconds: float = 0.0
    update_seconds: float = 0.0
    run_seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def since(self, before: Metrics) -> Metrics:
        """The counts between `before`, a copy made earlier, and now; peak_pages stays a peak."""
        names = [field.name for field in fields(self) if field.name != "peak_pages"]
        return Metrics(
            peak_pages=self.peak_pages,
            **{name: getattr(self, name) - getattr(before, name) for name in names},
        )
