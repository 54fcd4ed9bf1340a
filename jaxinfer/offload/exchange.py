"""What the host does for one layer of one step: decide and compute. Plain numpy; no JAX runs in here."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jaxinfer.offload.foresight import Foresight
from jaxinfer.offload.host_experts import ExpertError, LayerExperts
from jaxinfer.offload.latency import Costs
from jaxinfer.offload.policy import Policy
from jaxinfer.offload.residents import Residents
from jaxinfer.offload.store import ExpertStore
from jaxinfer.offload.timeline import Load, Split, device_seconds, worth_ahead


@dataclass
class Traffic:
    """Counts since the model was loaded.

    Attributes:
      visits: (token, expert) pairs; hits: those whose expert was on the device; on_host: those that the host computed.
      streamed: experts brought to the device; streamed_bytes: their bytes; kept: those of them that took a resident's place;
        ahead: those that were brought for the next layer; ahead_used: those of them that it then asked for.
      layers: questions, one a layer and step; collected: those whose answer came in two parts.
    """

    visits: int = 0
    hits: int = 0
    on_host: int = 0
    streamed: int = 0
    streamed_bytes: int = 0
    kept: int = 0
    ahead: int = 0
    ahead_used: int = 0
    layers: int = 0
    collected: int = 0


@dataclass(frozen=True)
class Answer:
    """What the host tells the device.

    Attributes:
      slots: int32 [T, K], the slot of each pair whose expert is there; -1 for all others.
      stream: experts of the layer that the device brings and computes with.
      moves: (slot, place in the store) that the device brings after that, for layers and steps to come.
      later: whether the device asks again for what the host computes.
    """

    slots: np.ndarray
    stream: tuple[int, ...]
    moves: tuple[tuple[int, int], ...]
    later: bool


class Exchange:
    """Serves the callbacks of a model: for each layer `answer`, then `collect`.

    The slot table changes with each answer, as the pool does in the program that receives it; programs take the pool from
    each other, so table and pool go the same way.

    Attributes:
      visits: int [L, E] since the model was loaded.

    Args:
      foresight: what the next layer will ask for; None leaves that alone.
      adaptive: experts that the workload asks for more than for a resident take its place.
    """

    def __init__(
        self,
        store: ExpertStore,
        residents: Residents,
        host: LayerExperts,
        policy: Policy,
        costs: Costs,
        *,
        foresight: Foresight | None,
        adaptive: bool,
    ):
        self.traffic = Traffic()
        self.visits = np.zeros((len(store.layers), store.experts), np.int64)
        self._store, self._residents, self._host = store, residents, host
        self._policy, self._costs, self._foresight, self._adaptive = policy, costs, foresight, adaptive
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="expert-host")
        self._work: Future[np.ndarray] | None = None
        self._expected: dict[int, set[int]] = {}

    def answer(self, row: int, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> Answer:
        """Decides, and sets the host to work. row: the layer's place among those with experts; x [T, D]; ids int32,
        shares float32 [T, K].

        Raises:
          ExpertError: naming the layer and, where it is one's fault, the expert. Nothing has changed then.
        """
        self._settle()
        try:
            tokens = np.bincount(ids[ids >= 0], minlength=self._store.experts)
            load = Load(tokens, self._residents.of_layer(row))
            split = self._policy(load, self._costs)
            ahead = self._foresee(row, x[(ids >= 0).any(axis=1)], load, split)
        except Exception as error:
            raise ExpertError(self._store.layers[row], None, error) from error
        if split.host:
            theirs = np.where(np.isin(ids, split.host), ids, -1)
            self._work = self._computing.submit(
                self._compute, row, split.host, x.copy(), theirs, shares.copy()
            )
        later = bool(split.host) and device_seconds(load, split, self._costs) > self._costs.ask
        slots = self._residents.slots(row, ids)
        self._count(row, load, split, later)
        moves = (*self._keep(row, load), *self._bring_ahead(row + 1, ahead))
        return Answer(slots, split.stream, moves, later)

    def collect(self, shape: tuple[int, ...]) -> np.ndarray:
        """What the host computes for the layer of the last answer: float32 [T, D]. Waits for it.

        Raises:
          ExpertError: as `answer`.
        """
        work, self._work = self._work, None
        return np.zeros(shape, np.float32) if work is None else work.result()

    def close(self) -> None:
        """Waits for what is under way and ends the threads."""
        self._settle()
        self._computing.shutdown()
        self._host.close()

    def _compute(self, row: int, experts: tuple[int, ...], *given: np.ndarray) -> np.ndarray:
        try:
            return self._host.compute(row, *given)
        except Exception as error:
            expert = experts[0] if len(experts) == 1 else None
            raise ExpertError(self._store.layers[row], expert, error) from error

    def _keep(self, row: int, load: Load) -> list[tuple[int, int]]:
        """The one expert of the layer that the workload wants most takes the place of a resident that it wants least."""
        residents = self._residents
        residents.visit(row, load.tokens)
        wanted = [
            int(expert) for expert in np.flatnonzero(load.tokens) if not residents.stays(row, int(expert))
        ]
        if not (self._adaptive and wanted and residents.landing):
            return []
        expert = max(wanted, key=lambda expert: residents.scores[row, expert])
        victim = residents.victim(row, expert)
        if victim is None:
            return []
        self.traffic.kept += 1
        moves = [] if residents.slot_of[row, expert] >= 0 else [self._bring(row, expert)]
        residents.keep(row, expert, victim)
        return moves

    def _foresee(self, row: int, x: np.ndarray, load: Load, split: Split) -> list[int]:
        """Experts that the next layer will ask for and that are worth bringing now."""
        apart, last = self._costs.apart, row + 1 == len(self._store.layers)
        if self._foresight is None or last or not apart:  # the same cores gain nothing by doing it earlier
            return []
        following = Load(self._foresight.tokens(row, x), self._residents.of_layer(row + 1))
        count = min(worth_ahead(load, split, following, self._costs), len(self._residents.landing))
        return [int(expert) for expert in following.missing[:count]]

    def _bring_ahead(self, row: int, experts: list[int]) -> list[tuple[int, int]]:
        self.traffic.ahead += len(experts)
        self._expected = {row: set(experts)}
        return [self._bring(row, expert) for expert in experts]

    def _bring(self, row: int, expert: int) -> tuple[int, int]:
        self.traffic.streamed += 1
        self.traffic.streamed_bytes += self._store.record.nbytes
        return self._residents.bring(row, expert), row * self._store.experts + expert

    def _count(self, row: int, load: Load, split: Split, later: bool) -> None:
        traffic = self.traffic
        traffic.layers += 1
        traffic.collected += later
        self.visits[row] += load.tokens
        traffic.visits += int(load.tokens.sum())
        traffic.hits += int(load.tokens[load.resident].sum())
        traffic.on_host += int(load.tokens[list(split.host)].sum())
        traffic.streamed += len(split.stream)
        traffic.streamed_bytes += len(split.stream) * self._store.record.nbytes
        traffic.ahead_used += sum(bool(load.tokens[expert]) for expert in self._expected.get(row, ()))

    def _settle(self) -> None:
        """Wait for what an abandoned step has under way."""
        work, self._work = self._work, None
        if work is not None:
            work.exception()
