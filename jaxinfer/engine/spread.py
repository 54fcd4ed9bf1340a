"""How a model and its pool lie on devices, as the engine asks: whole, on one. `scaleout.mesh.Mesh` is the other kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder
from jaxinfer.models.placement import Placement
from jaxinfer.split import ALL_HEADS, WHOLE, HeadSplit, Split

Place = Callable[[str, tuple[int, ...]], Placement]
"""By a parameter's path and shape."""
Step = Callable[..., tuple[Any, Any]]
"""step(weights, state, *batch) -> (state, results)"""


@dataclass(frozen=True)
class Spread:
    """Everything is on one device."""

    @property
    def devices(self) -> Sequence[jax.Device]:
        return jax.local_devices()[:1]

    @property
    def heads(self) -> HeadSplit:
        return ALL_HEADS

    @property
    def vocabulary(self) -> Split:
        return WHOLE

    def local(self, config: ModelConfig) -> ModelConfig:
        """The model as the program of one device sees it: its heads."""
        return config

    def share(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what one device holds of a parameter of `abstract(config)`, by its path."""
        return shape

    @property
    def place(self) -> Place | None:
        """Where the parameters of `abstract(config)` go; for `models.checkpoint.load_model`."""
        return None

    def shares(self, model: Decoder) -> Decoder:
        """The model whose arrays went there, with weights that exchange what other devices need of them."""
        return model

    def layout(self, weights: Iterable[jax.Array]) -> tuple[Any, ...]:
        """How the arrays of a model lie on the devices, for `program`."""
        return ()

    def program(self, step: Step, layout: tuple[Any, ...]) -> Step:
        """A step over whole arrays, from one that sees what a device has."""
        return step

    def new_state(self, make: Callable[[], Any]) -> Any:
        """On all devices what `make` gives for each."""
        return make()


ONE_DEVICE = Spread()
