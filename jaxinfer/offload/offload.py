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
from jaxinfer.models.layers import Decoder
from jaxinfer.models.moe import Experts
from jaxinfer.offload.callback import CallbackExperts
from jaxinfer.offload.exchange import Exchange
from jaxinfer.offload.foresight import Foresight
from jaxinfer.offload.host_experts import ExpertError, LayerExperts
from jaxinfer.offload.latency import Costs
from jaxinfer.offload.measure import machine_profile
from jaxinfer.offload.placement import PLACEMENTS, read_popularity
from jaxinfer.offload.policy import POLICIES
from jaxinfer.offload.pool import empty, fill_now, link
from jaxinfer.offload.residents import Residents
from jaxinfer.offload.store import ExpertStore


class Offload:
    """Attributes:
    records: uint8 [N, bytes of an expert], all experts in the host's memory: an argument of every step.
    residents: the slot table.
    costs: of one expert on this machine.

    Args:
      model: without its experts.
      slots: of the device's pool.

    Raises:
      ConfigError: settings that do not fit the model or the machine.
    """

    def __init__(
        self,
        store: ExpertStore,
        model: Decoder,
        config: ModelConfig,
        settings: OffloadSettings,
        slots: int,
    ):
        shape = (len(store.layers), store.experts)
        _check_memory(store)
        popularity = read_popularity(settings.popularity, *shape) if settings.popularity else np.ones(shape)
        landing = 0 if slots >= shape[0] * shape[1] else min(settings.landing_slots, slots)
        resident = PLACEMENTS[settings.placement](popularity, slots - landing)
        self.residents = Residents(resident, landing, popularity)
        self._store = store
        host = LayerExperts(store, activation=config.activation, threads=settings.threads)
        self.records, store.records = link(store.records)
        self.costs: Costs = machine_profile(
            store,
            self.records,
            host,
            activation=config.activation,
            folder=_profiles(),
            threads=settings.threads,
        ).costs
        self._exchange = Exchange(
            store,
            self.residents,
            host,
            POLICIES[settings.policy],
            self.costs,
            foresight=Foresight.of(model, config) if settings.policy == "balanced" else None,
            adaptive=settings.adaptive,
        )
        rows = {layer: row for row, layer in enumerate(store.layers)}
        self._seam = CallbackExperts(
            self._exchange,
            store.record,
            tuple(rows.get(i, -1) for i in range(config.layers)),
            config.activation,
            experts=store.experts,
            moves=landing + 1,
        )

    def move_in(self) -> jax.Array:
        """The pool with the first residents in it, uint8 [S, bytes of an expert]: a part of the state that steps hand on.
        The host need not keep theirs."""
        places = self.residents.begin()
        moves = [(slot, row * self._store.experts + expert) for slot, (row, expert) in enumerate(places)]
        pool = empty(self.residents.count, self._store.record.nbytes)
        if moves:
            pool = fill_now(pool, self.records, np.array(moves, np.int32), np.int32(len(moves)))
        jax.block_until_ready(pool)
        for place in places:
            self._store.forget(*place)
        return pool

    def bind(self, records: jax.Array) -> Experts:
        """The `experts` of a forward pass, for one trace."""
        return self._seam.bind(records)

    def take_failure(self) -> ExpertError | None:
        """What went wrong in the steps since the last call of this; the results of those steps are worthless."""
        return self._seam.take_failure()

    def metrics(self) -> dict[str, float]:
        """Counts since the model was loaded, see `exchange.Traffic`."""
        return {f"expert_{name}": value for name, value in asdict(self._exchange.traffic).items()}

    def visits(self) -> np.ndarray:
        """How often each expert was asked for since the model was loaded: int [L, E] of the layers with experts."""
        return self._exchange.visits.copy()

    def close(self) -> None:
        """Ends the threads."""
        self._exchange.close()


def _profiles() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfer" / "machine"


def _check_memory(store: ExpertStore) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if store.nbytes > total:
        raise ConfigError(
            f"offload.device_memory: {store.nbytes} bytes of experts are on the host, which has {total} bytes of memory; "
            'hold them as offload.experts = "int8" or "int4"'
        )
