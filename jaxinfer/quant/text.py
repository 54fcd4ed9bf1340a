"""Calibration windows from text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.quant.form import Quantization

FEWEST_TOKENS = 64


def windows(ids: Sequence[int] | np.ndarray, form: Quantization, context: int) -> np.ndarray:
    """Windows of form.length tokens (or what context and text have) at random places: int32 [form.samples, T].

    The places are those that the authors draw: Python's generator with the form's seed, uniformly, one window after
    another. A text of a few windows only gives each of them once.

    Raises:
      ConfigError: the text is empty or has fewer than 64 tokens.
    """
    ids = np.asarray(ids, np.int32)
    if len(ids) < FEWEST_TOKENS:
        raise ConfigError(
            f"calibration text: {len(ids)} tokens; at least {FEWEST_TOKENS} are needed, "
            f"{form.samples} x {form.length} are good"
        )
    length = min(form.length, context, len(ids))
    if len(ids) <= form.samples * length:
        count = len(ids) // length
        return ids[: count * length].reshape(count, length)
    draw = random.Random(form.seed)
    starts = [draw.randint(0, len(ids) - length - 1) for _ in range(form.samples)]
    return np.stack([ids[start : start + length] for start in starts])


def encode(text: str, tokenize: Callable[[str], Sequence[int]]) -> np.ndarray:
    """Token ids of a text. Raises ConfigError where there is none."""
    if not text.strip():
        raise ConfigError("calibration text: is empty")
    return np.asarray(tokenize(text), np.int32)
