"""The host's side of the experts: computes those of one layer where their records lie."""

from __future__ import annotations

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.offload.store import ExpertStore
from pallas_kernels.packed_experts.host import HostExperts


class ExpertError(Exception):
    """Something failed in the host's work for a layer.

    Attributes:
      layer: of the model.
      expert: the one at hand; None where it was none in particular.
    """

    def __init__(self, layer: int, expert: int | None, reason: BaseException):
        which = f"layer {layer}" if expert is None else f"layer {layer}, expert {expert}"
        super().__init__(f"{which}: {type(reason).__name__}: {reason}")
        self.layer, self.expert = layer, expert


class LayerExperts:
    """All experts of a model, computed by the host's cores.

    Args:
      threads: None for all cores.

    Raises:
      ConfigError: the kernel does not know the activation, or cannot be compiled here.
    """

    def __init__(self, store: ExpertStore, *, activation: str, threads: int | None):
        self._store = store
        try:
            self._kernel = HostExperts(store.record, activation=activation, threads=threads)
        except NotImplementedError as error:
            raise ConfigError(
                f"offload.device_memory: the host cannot compute experts here: {error}"
            ) from None

    def compute(self, row: int, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """The sum over the experts that are not negative. x [T, D], ids int32 [T, K], shares float32 [T, K] -> float32 [T, D].

        row: the layer's place among those with experts.
        """
        return self._kernel(x, self._store.of_layer(row), ids, shares)

    def close(self) -> None:
        self._kernel.close()
