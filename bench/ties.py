"""Answers that differ between two runs of the same greedy requests: rounding, or a fault."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxinfer.core import Request, SamplingParams
from jaxinfer.engine.engine import Engine

ROUNDING = 1e-5
"""Of log-probabilities in float32. Those of one token, its request alone or among others, were at most 4e-6 apart in 2,139 tokens
of a random model 768 wide: matrix products round differently for another number of rows, and prefixes in other chunks."""


def widest_tie(
    engine: Engine, request: Request, answers: Mapping[str, tuple[int, ...]], limit: float = ROUNDING
) -> float:
    """How far apart the two likeliest tokens are, in log-probability, where answers to one request part, the widest of all;
    0 for equal answers.

    Args:
      engine: serves the request alone up to where they part, and idles otherwise.
      answers: token ids by the name of the run.

    Raises:
      AssertionError: answers part where the likeliest tokens are further apart than `limit`, or at another token than these.
    """
    widest = 0.0
    (first, of_first), *others = answers.items()
    for name, of_other in others:
        if of_other == of_first:
            continue
        where = f"request {request.id}: {first} and {name} differ"
        assert len(of_other) == len(of_first), f"{where} in length, {len(of_first)} and {len(of_other)}"
        at = next(place for place, pair in enumerate(zip(of_first, of_other)) if len(set(pair)) > 1)
        top = _likeliest(engine, request, of_first[:at])
        margin = top[0][1] - top[1][1]
        told = {of_first[at], of_other[at]}
        assert told == {token for token, _ in top} and margin <= limit, (
            f"{where} at token {at}: {of_first[at]} and {of_other[at]}, while alone {top} are the likeliest"
        )
        widest = max(widest, margin)
    return widest


def _likeliest(engine: Engine, request: Request, generated: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    """The two likeliest next tokens after a prompt and what follows it, with their log-probabilities."""
    engine.forget_prefixes()
    prompt = np.concatenate([request.prompt_ids, np.asarray(generated, np.int32)])
    sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=2)
    (out,) = engine.run([Request(id="next", prompt_ids=prompt, sampling=sampling)])
    assert out.error is None, out.error
    logprobs = out.choices[0].logprobs
    assert logprobs is not None, "they were asked for"
    return logprobs[0].top
