"""Which experts the next layer will ask for: its router applied to the hidden state of this one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from flax import nnx

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder, MoE, Norm


@dataclass(frozen=True)
class Foresight:
    """Between two layers the hidden state changes little, so the next router sees nearly what it will see.

    Attributes:
      routers: float32 [L - 1, D, E] with the norms' scales in them: entry l makes layer l + 1's scores of what the experts
        of layer l are given. L counts layers with experts.
      offsets: float32 [L - 1, E], what the norms' biases add.
      experts_per_token: of the model.
    """

    routers: np.ndarray
    offsets: np.ndarray
    experts_per_token: int

    @classmethod
    def of(cls, model: Decoder, config: ModelConfig) -> Foresight:
        assert config.moe is not None
        scales, biases, routers = map(np.stack, zip(*_routers(model), strict=True))
        ratios = scales[1:] / np.where(scales[:-1] == 0, np.inf, scales[:-1])
        shifts = biases[1:] - biases[:-1] * ratios
        offsets = np.einsum("ld,lde->le", shifts, routers[1:])
        return cls(ratios[:, :, None] * routers[1:], offsets, config.moe.experts_per_token)

    def tokens(self, layer: int, x: np.ndarray) -> np.ndarray:
        """int [E]: how many of the tokens that visit experts of `layer`, x [T, D], will visit each of the next one's."""
        scores = x.astype(np.float32) @ self.routers[layer] + self.offsets[layer]
        chosen = np.argsort(scores, axis=1)[:, -self.experts_per_token :]
        return np.bincount(chosen.ravel(), minlength=scores.shape[1])


def _routers(model: Decoder) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Scale and bias [D] of the norm before the experts, and router [D, E], layer by layer."""
    for run in model.runs:
        for layer in run if isinstance(run, nnx.List) else [run]:
            if isinstance(layer.mlp, MoE):
                yield from _stacked(layer.mlp_norm, layer.mlp)


def _stacked(before: Norm, experts: MoE) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    router = np.asarray(experts.router, np.float32)
    scale = np.asarray(before.scale, np.float32)
    bias = before.bias
    shift = np.zeros_like(scale) if bias is None else np.asarray(bias, np.float32)
    yield from zip(*(np.reshape(a, (-1, *a.shape[-n:])) for a, n in ((scale, 1), (shift, 1), (router, 2))))
