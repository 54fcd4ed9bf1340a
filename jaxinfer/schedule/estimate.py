"""How much of a planned batch is left, and how long it takes."""

from __future__ import annotations

import numpy as np

from jaxinfer.schedule.workload import Sharing, Workload

_PRIOR_SHARE = 0.5  # of its limit that an answer is taken to use before any has ended
_PRIOR_ANSWERS = 8  # answers of average limit that this guess counts as


class Estimate:
    """Work is counted in tokens through the model: prompt tokens that no other prompt shares, and answer tokens.

    Lengths of answers follow from the share of their limits that finished answers have used, those of an earlier run among them.

    Attributes:
      rows: to be served.
      answer_share: expected length of an answer over its limit, in (0, 1].
    """

    def __init__(self, workload: Workload, sharing: Sharing):
        known, limits = workload.known, workload.answer_limits
        open_ = known < 0
        self.rows = int(np.count_nonzero(open_))
        alone = 1 - sharing.shared_tokens / max(len(workload.tokens), 1)
        self._prompts = round(int(workload.prompt_tokens[open_].sum()) * alone)
        self._limits = int(limits[open_].sum())
        self._weight = max(_PRIOR_ANSWERS * self._limits / max(self.rows, 1), 1.0)
        self._generated = _PRIOR_SHARE * self._weight
        self.finish(int(limits[~open_].sum()), int(known[~open_].sum()))

    @property
    def answer_share(self) -> float:
        return min(self._generated / self._weight, 1.0)

    @property
    def tokens(self) -> float:
        """Of the whole batch."""
        return self._prompts + self.answer_share * self._limits

    def finish(self, limit: int, generated: int) -> None:
        """Learn from a finished request how much of its limit was used."""
        self._weight += limit
        self._generated += generated

    def share(self, computed: float) -> float:
        """Finished part of the batch, in [0, 1], when `computed` tokens went through the model."""
        return min(computed / self.tokens, 1.0) if self.tokens else 1.0

    def seconds_left(self, computed: float, seconds: float) -> float | None:
        """At the rate so far, `computed` tokens in `seconds`; None before there is a rate."""
        if computed <= 0 or seconds <= 0:
            return None
        return max(self.tokens - computed, 0.0) * seconds / computed
