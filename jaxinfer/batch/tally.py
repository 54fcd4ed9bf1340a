"""Counts of a run: for the progress bar, the summary and the metrics file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxinfer.core import Usage
from jaxinfer.schedule.estimate import Estimate


@dataclass(slots=True)
class Tally:
    """What happened so far.

    Attributes:
      kept: rows of an earlier run that are in the output already, errors among them included.
      answered, errors: rows of this run; errors by code.
      kept_errors: errors by code among the kept rows.
      read: rows read so far, finished or not.
      position, size: bytes of the input read so far, and in all (None if unknown).
      survey_seconds: time for reading and planning the whole input.
      estimate: of the planned work; None while the input is still being read.
      started: when answering began.
      workers: says how the workers do, where there are several.
    """

    kept: int = 0
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    kept_errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    read: int = 0
    position: int = 0
    size: int | None = None
    survey_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    estimate: Estimate | None = None
    workers: Callable[[], str] | None = None
    _computed: Callable[[], float] = lambda: 0.0

    def plan(self, estimate: Estimate, computed: Callable[[], float]) -> None:
        """From here on progress is told by work: `computed` gives the tokens that went through the model so far."""
        self.estimate, self._computed = estimate, computed

    def answer(self, usage: Usage, limit: int) -> None:
        """Count an answered row that could have had `limit` tokens."""
        self.answered += 1
        if self.estimate is not None:
            self.estimate.finish(limit, usage.completion_tokens)
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generated_tokens += usage.completion_tokens

    @property
    def all_errors(self) -> Counter[str]:
        return self.errors + self.kept_errors

    @property
    def rows(self) -> int:
        return self.kept + self.answered + self.errors.total()

    @property
    def share(self) -> float | None:
        """Finished part of the reading, or once the batch is planned of the work; None for an input of unknown size."""
        if self.estimate is not None:
            return 1.0 if self.answered + self.errors.total() >= self.estimate.rows else self._work_share()
        return None if self.size is None else self.position / self.size if self.size else 1.0

    def _work_share(self) -> float:
        assert self.estimate is not None
        return min(self.estimate.share(self._computed()), 0.999)

    @property
    def seconds_left(self) -> float | None:
        """By the plan's own estimate; None before there is one."""
        return None if self.estimate is None else self.estimate.seconds_left(self._computed(), self.seconds)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def rates(self) -> tuple[float, float]:
        """Prompt tokens and generated tokens per second."""
        seconds = max(self.seconds, 1e-9)
        return self.prompt_tokens / seconds, self.generated_tokens / seconds

    def summary(self) -> str:
        """Two lines for people."""
        prompt_rate, generated_rate = self.rates()
        errors = ", ".join(f"{code} {count:,}" for code, count in self.all_errors.most_common(6))
        total = self.all_errors.total()
        kept = f", {self.kept:,} of them kept from an earlier run" if self.kept else ""
        rows = f"{self.rows:,} rows in {self.seconds:.1f} s{kept}; {total:,} errors" + (
            f" ({errors})" if errors else ""
        )
        tokens = (
            f"{self.prompt_tokens:,} prompt tokens ({self.cached_share:.0%} cached, {prompt_rate:,.0f}/s), "
            f"{self.generated_tokens:,} generated ({generated_rate:,.0f}/s)"
        )
        return f"{rows}\n{tokens}"

    def metrics(self) -> dict[str, float]:
        """Flat numbers for scripts."""
        prompt_rate, generated_rate = self.rates()
        return {
            "rows": self.rows,
            "kept": self.kept,
            "answered": self.answered,
            "errors": self.all_errors.total(),
            "seconds": self.seconds,
            "survey_seconds": self.survey_seconds,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "cached_share": self.cached_share,
            "generated_tokens": self.generated_tokens,
            "prompt_tokens_per_s": prompt_rate,
            "generated_tokens_per_s": generated_rate,
            "tokens_per_s": prompt_rate + generated_rate,
        } | {f"errors_{code}": count for code, count in self.all_errors.items()}
