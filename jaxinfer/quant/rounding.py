"""Weights to integers: the scales of groups, and rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxinfer.quant.form import Quantization

SMALLEST = 1e-8  # the least magnitude that a group of weights is taken to have
FINEST = 15  # the largest group scale of two levels: -8 * 15 is still an 8-bit integer


@dataclass(frozen=True)
class Rounded:
    """A matrix [N, K] as integers, input channels in their final order; fields as in `PackedMatrix`, codes not yet packed.

    Attributes:
      codes: int8 [N, L], -8 to 7.
      scale: float32 [N / rows, G], or uint8 [N, G] beside `channel`.
      high: int8 or float16 [N, H].
    """

    codes: np.ndarray
    scale: np.ndarray
    channel: np.ndarray | None
    high: np.ndarray
    high_scale: np.ndarray | None

    def weights(self) -> np.ndarray:
        """float64 [N, K]: what the integers stand for."""
        low = np.zeros((len(self.codes), 0))
        if self.codes.size:
            steps = np.repeat(self.scale.astype(np.float64), len(self.codes) // len(self.scale), axis=0)
            if self.channel is not None:
                steps = steps * self.channel.astype(np.float64)[:, None]
            low = self.codes * np.repeat(steps, self.codes.shape[1] // self.scale.shape[1], axis=1)
        high = self.high.astype(np.float64)
        if self.high_scale is not None:
            high = high * self.high_scale.astype(np.float64)[:, None]
        return np.concatenate([low, high], axis=1)


class Steps:
    """The scales of one matrix, found group by group.

    GPTQ's quantizer and plain rounding divide the clipped range differently in the authors' code: 2 * largest / 15 there,
    largest / 7 here.
    """

    def __init__(self, weights: np.ndarray, form: Quantization, clip: float):
        self.form, self.clip = form, clip
        self.channel: np.ndarray | None = None
        if form.two_level:
            kept = form.kept(weights.shape[1])
            groups = weights[:, :kept].reshape(len(weights), -1, form.group_of(weights.shape[1]))
            widest = self._float_step(np.abs(groups).max((1, 2)))
            self.channel = widest / np.float32(FINEST)

    def find(self, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scale of one group, as stored, and the step of each row. block [N, g] -> [N / rows] or [N], float32 [N]."""
        largest = np.abs(block).max(1).reshape(-1, self.form.rows).max(1)
        scale = self._float_step(largest)
        if self.channel is None:
            return scale, np.repeat(scale, self.form.rows)
        fine = np.clip(np.rint(scale / self.channel), 1, FINEST).astype(np.uint8)
        return fine, fine * self.channel

    def _float_step(self, largest: np.ndarray) -> np.ndarray:
        largest = np.maximum(largest.astype(np.float32), np.float32(SMALLEST))
        if self.form.method == "gptq":
            return np.float32(2 * self.clip) * largest / np.float32(15)
        return np.float32(self.clip) * largest / np.float32(7)


def nearest(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """4-bit codes: round to nearest, ties to even, -8 to 7."""
    return np.clip(np.rint(values / steps), -8, 7)


def round_high(
    weights: np.ndarray, form: Quantization, clip: float = 1.0
) -> tuple[np.ndarray, np.ndarray | None]:
    """The part that is kept in 8 bits, one scale a row, or in 16. weights [N, H]."""
    if not weights.shape[1]:
        return np.zeros(weights.shape, np.int8), None
    if form.outlier_bits == 16 and form.weight_bits == 4:
        return weights.astype(np.float16), None
    largest = np.maximum(np.abs(weights).max(1).astype(np.float32), np.float32(SMALLEST))
    scale = np.float32(clip) * largest / np.float32(127)
    return np.clip(np.rint(weights / scale[:, None]), -127, 127).astype(np.int8), scale


def round_nearest(weights: np.ndarray, form: Quantization, clip: float) -> Rounded:
    """Every weight by itself. weights [N, K] with channels in their final order."""
    kept, group = form.kept(weights.shape[1]), form.group_of(weights.shape[1])
    if not kept:
        none = np.zeros((len(weights), 0), np.int8)
        return Rounded(none, none, None, *round_high(weights, form, clip))
    steps = Steps(weights, form, clip)
    codes, scales = np.empty((len(weights), kept), np.int8), []
    for begin in range(0, kept, group):
        block = weights[:, begin : begin + group]
        scale, each = steps.find(block)
        scales.append(scale)
        codes[:, begin : begin + group] = nearest(block, each[:, None])
    return Rounded(codes, np.stack(scales, 1), steps.channel, *round_high(weights[:, kept:], form))
