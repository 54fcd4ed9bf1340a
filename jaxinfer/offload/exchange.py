"""What the host does for one layer of one step: decide, stream, compute. Plain numpy; no JAX runs in here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jaxinfer.offload.host_experts import ExpertError, LayerExperts
from jaxinfer.offload.latency import Costs
from jaxinfer.offload.policy import Policy
from jaxinfer.offload.pool import SlotPool
from jaxinfer.offload.residents import Residents
from jaxinfer.offload.store import ExpertStore
from jaxinfer.offload.timeline import Load, Split


@dataclass
class Traffic:
    """Counts since the model was loaded.

    Attributes:
      visits: (token, expert) pairs; hits: those whose expert was on the device; on_host: those that the host computed.
      streamed: experts brought to the device; streamed_bytes: their bytes; kept: those of them that stayed.
      layers: exchanges, one a layer and step; rounds: callbacks.
    """

    visits: int = 0
    hits: int = 0
    on_host: int = 0
    streamed: int = 0
    streamed_bytes: int = 0
    kept: int = 0
    layers: int = 0
    rounds: int = 0


@dataclass
class Answer:
    """What one round tells the device.

    Attributes:
      slots: int32 [T, K], the slot of each pair that the device computes now; -1 for all others.
      partial: float32 [T, D], what the host computed.
      more: whether another round follows.
    """

    slots: np.ndarray
    partial: np.ndarray
    more: bool


class _Work:
    """A layer's work in progress: `groups` of streamed experts, one for each round, and what the host computes."""

    def __init__(self, row: int, ids: np.ndarray):
        self.row, self.ids = row, ids
        self.groups: list[list[int]] = []
        self.copies: list[Future[list[int]]] = []
        self.host: Future[np.ndarray] | None = None


class Exchange:
    """Serves the callbacks of a model, which come one at a time: `answer(row, round 0)`, and further rounds while there
    are more experts to stream than landing slots.

    A round returns when its experts are in their slots; the next ones land meanwhile in the other half of the landing
    slots. A slot is written again only in a round whose callback depends on the result of the round that read it.

    Args:
      adaptive: streamed experts that the workload asks for more than for a resident take its place.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: SlotPool,
        residents: Residents,
        host: LayerExperts,
        policy: Policy,
        costs: Costs,
        *,
        adaptive: bool,
    ):
        self.traffic = Traffic()
        self._store, self._pool, self._residents, self._host = store, pool, residents, host
        self._policy, self._costs, self._adaptive = policy, costs, adaptive
        self._link = ThreadPoolExecutor(1, thread_name_prefix="expert-link")
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="expert-host")
        self._work: _Work | None = None
        self._promotion: tuple[Future[list[int]], int, int] | None = None

    def answer(self, row: int, round: int, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> Answer:
        """One round. row: the layer's place among those with experts; x [T, D]; ids int32, shares float32 [T, K].

        Raises:
          ExpertError: naming the layer and, where it is one's fault, the expert.
        """
        try:
            self.traffic.rounds += 1
            if round == 0:
                self._begin(row, x, ids, shares)
            return self._finish(round, x.shape)
        except ExpertError:
            self._settle()
            raise
        except Exception as error:
            self._settle()
            raise ExpertError(self._store.layers[row], None, error) from error

    def close(self) -> None:
        """Waits for what is under way and ends the threads."""
        self._settle()
        self._link.shutdown()
        self._computing.shutdown()
        self._host.close()

    def _begin(self, row: int, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> None:
        self._settle()
        self._end_promotion()
        tokens = np.bincount(ids[ids >= 0], minlength=self._store.experts)
        load = Load(tokens, self._residents.of_layer(row))
        split = self._policy(load, self._costs)
        self._residents.visit(row, tokens)
        self._count(load, split)
        work = self._work = _Work(row, ids.copy())
        if split.host:
            theirs = np.where(np.isin(ids, split.host), ids, -1)
            compute = self._named(row, split.host, self._host.compute)
            work.host = self._computing.submit(compute, row, x.copy(), theirs, shares.copy())
        size = max(1, len(self._residents.landing) // 2)
        streams = list(split.stream)
        work.groups = [streams[first : first + size] for first in range(0, len(streams), size)]
        if streams:
            self._land(work, 0)
        else:
            self._promote(row, split.host)

    def _promote(self, row: int, wanted: tuple[int, ...]) -> None:
        """Bring the one of the host's experts that the workload wants most, beside all other work, for the steps to come."""
        if not (self._adaptive and self._pool.streams and wanted and self._residents.landing):
            return
        expert = max(wanted, key=lambda expert: self._residents.scores[row, expert])
        if self._residents.victim(row, expert) is not None:
            copy = self._link.submit(self._copy, row, [expert], [self._residents.landing[0]])
            self._promotion = (copy, row, expert)

    def _end_promotion(self) -> None:
        if self._promotion is None:
            return
        (copy, row, expert), self._promotion = self._promotion, None
        self.traffic.streamed += 1
        self.traffic.streamed_bytes += self._pool.nbytes
        self._move_in(row, expert, copy.result()[0])

    def _finish(self, round: int, shape: tuple[int, ...]) -> Answer:
        work = self._work
        assert work is not None
        table = np.full(self._store.experts + 1, -1, np.int32)  # the last entry is that of id -1
        if round == 0:
            table[:-1] = self._residents.slot_of[work.row]
        if round < len(work.groups):
            self._land(work, round)
            if len(self._residents.landing) > 1:
                self._land(work, round + 1)
            table[work.groups[round]] = work.copies[round].result()
        more = round + 1 < len(work.groups)
        partial = np.zeros(shape, np.float32)
        if not more:
            if work.host is not None:
                partial = work.host.result()
            self._keep(work)
            self._work = None
        return Answer(table[work.ids], partial, more)

    def _land(self, work: _Work, group: int) -> None:
        """Have the link bring a group, if there is one and it is not on its way."""
        if group != len(work.copies) or group >= len(work.groups):
            return
        size = max(1, len(self._residents.landing) // 2)
        first = (group % 2) * size if len(self._residents.landing) > 1 else 0
        slots = list(self._residents.landing)[first : first + len(work.groups[group])]
        work.copies.append(self._link.submit(self._copy, work.row, work.groups[group], slots))

    def _copy(self, row: int, experts: list[int], slots: list[int]) -> list[int]:
        for expert, slot in zip(experts, slots, strict=True):
            self._named(row, (expert,), self._pool.write)(slot, self._store.of_layer(row)[expert])
        return slots

    def _keep(self, work: _Work) -> None:
        """Residents change places with what landed last, where the workload is for it: nothing more has to move."""
        if not self._adaptive or not work.copies:
            return
        for expert, slot in zip(work.groups[-1], work.copies[-1].result(), strict=True):
            self._move_in(work.row, expert, slot)

    def _move_in(self, row: int, expert: int, slot: int) -> None:
        victim = self._residents.victim(row, expert)
        if victim is not None:
            self._residents.keep(row, expert, slot, victim)
            self.traffic.kept += 1

    def _count(self, load: Load, split: Split) -> None:
        traffic = self.traffic
        traffic.layers += 1
        traffic.visits += int(load.tokens.sum())
        traffic.hits += int(load.tokens[load.resident].sum())
        traffic.on_host += int(load.tokens[list(split.host)].sum())
        traffic.streamed += len(split.stream)
        traffic.streamed_bytes += len(split.stream) * self._pool.nbytes

    def _settle(self) -> None:
        """Wait for whatever an abandoned layer has under way: its slots and buffers must be free."""
        work, self._work = self._work, None
        futures: list[Future] = [*work.copies, *([work.host] if work.host else [])] if work else []
        for future in futures:
            future.exception()

    def _named(self, row: int, experts: tuple[int, ...], call: Callable) -> Callable:
        """`call` with its exceptions named: by the expert if it is the only one."""

        def named(*args):
            try:
                return call(*args)
            except Exception as error:
                expert = experts[0] if len(experts) == 1 else None
                raise ExpertError(self._store.layers[row], expert, error) from error

        return named
