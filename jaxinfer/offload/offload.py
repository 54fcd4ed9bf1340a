"""Fiddler in one engine: the experts that the device holds, those that the host keeps, and who decides."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np

from jaxinfer.config import OffloadSettings
from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.moe import Experts
from jaxinfer.offload.callback import CallbackExperts
from jaxinfer.offload.exchange import Exchange
from jaxinfer.offload.host_experts import ExpertError, LayerExperts
from jaxinfer.offload.latency import Costs
from jaxinfer.offload.measure import machine_profile
from jaxinfer.offload.placement import PLACEMENTS, read_popularity
from jaxinfer.offload.policy import POLICIES
from jaxinfer.offload.pool import SlotPool
from jaxinfer.offload.residents import Residents
from jaxinfer.offload.store import ExpertStore


class Offload:
    """Attributes:
    residents: the slot table.
    costs: of one expert on this machine.

    Args:
      slots: of the device's pool, landing slots included.

    Raises:
      ConfigError: settings that do not fit the model, the platform or the machine.
    """

    def __init__(self, store: ExpertStore, config: ModelConfig, settings: OffloadSettings, slots: int):
        shape = (len(store.layers), store.experts)
        _check_memory(store, slots)
        popularity = read_popularity(settings.popularity, *shape) if settings.popularity else np.ones(shape)
        landing = 0 if slots >= shape[0] * shape[1] else min(settings.landing_slots, slots)
        resident = PLACEMENTS[settings.placement](popularity, slots - landing)
        self.residents = Residents(resident, landing, popularity)
        self._host = LayerExperts(store, activation=config.activation, threads=settings.threads)
        self._pool = SlotPool(slots, store.record.nbytes)
        if settings.policy == "stream" and not self._pool.streams and landing:
            raise ConfigError(
                'offload.policy = "stream": experts cannot be streamed during a step on '
                f"{jax.default_backend()}; choose balanced, fiddler or host"
            )
        self.costs: Costs = machine_profile(
            store,
            self._pool,
            self._host,
            activation=config.activation,
            folder=_profiles(),
            threads=settings.threads,
        ).costs
        self._move_in(store)
        self._exchange = Exchange(
            store,
            self._pool,
            self.residents,
            self._host,
            POLICIES[settings.policy],
            self.costs,
            adaptive=settings.adaptive,
        )
        rows = {layer: row for row, layer in enumerate(store.layers)}
        self._seam = CallbackExperts(
            self._exchange,
            store.record,
            tuple(rows.get(i, -1) for i in range(config.layers)),
            config.activation,
        )

    def _move_in(self, store: ExpertStore) -> None:
        """Copy the residents to their slots; the host need not keep theirs."""
        places = [(int(row), int(expert)) for row, expert in np.argwhere(self.residents.slot_of >= 0)]
        slots = [int(self.residents.slot_of[place]) for place in places]
        self._pool.fill(slots, [store.of_layer(row)[expert] for row, expert in places])
        for place in places:
            store.forget(*place)

    @property
    def pool(self) -> jax.Array:
        """An argument of every step."""
        return self._pool.array

    def bind(self, pool: jax.Array) -> Experts:
        """The `experts` of a forward pass, for one trace."""
        return self._seam.bind(pool)

    def take_failure(self) -> ExpertError | None:
        """What went wrong in the steps since the last call of this; the results of those steps are worthless."""
        return self._seam.take_failure()

    def metrics(self) -> dict[str, float]:
        """Counts since the model was loaded, see `exchange.Traffic`."""
        return {f"expert_{name}": value for name, value in asdict(self._exchange.traffic).items()}

    def close(self) -> None:
        """Ends the threads."""
        self._exchange.close()


def _profiles() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfer" / "machine"


def _check_memory(store: ExpertStore, slots: int) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kept = store.nbytes - slots * store.record.nbytes
    if kept > total:
        raise ConfigError(
            f"offload.device_memory: {kept} bytes of experts stay on the host, which has {total} bytes of memory; "
            'give the device more, or hold the experts as offload.experts = "int8" or "int4"'
        )
