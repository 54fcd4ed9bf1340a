"""A step-level simulation of a batch: any order, any machine, hundreds of thousands of requests in seconds.

The scanner is the one that the engine asks. A step takes `joint(compute, memory)` seconds: compute of all its tokens, at least
the reading of the weights, and memory time of the keys that its decoding requests read. Shared prefixes are computed by the
first request that needs them and stay while others use them, or while nothing else needs their room.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.pool import SimulatedPool
from jaxinfer.schedule.profile import Joint
from jaxinfer.schedule.steps import SimulatedSteps
from jaxinfer.schedule.tree import RequestTree

_SERIES = 400  # points of the curves over time


class Outcome(NamedTuple):
    """Attributes:
    seconds: of the whole batch.
    steps: how many.
    compute, memory: seconds of either resource's work, the weights' floor not counted.
    computed: tokens that went through the model.
    cached: prompt tokens found in the cache.
    recomputed: tokens computed again after a preemption.
    preemptions: requests that lost their place.
    smaller, bend: seconds of each step's smaller side, summed, and of its square over the larger one.
    series: float64 [points, 3], seconds, compute and memory time of consecutive stretches of steps.
    """

    seconds: float
    steps: int
    compute: float
    memory: float
    computed: int
    cached: int
    recomputed: int
    preemptions: int
    smaller: float
    bend: float
    series: np.ndarray

    def under(self, joint: Joint, instead_of: Joint) -> Outcome:
        """The same steps where both kinds of work take another time together; no scanner looks at seconds."""
        more = (joint.linear - instead_of.linear) * self.smaller
        return self._replace(seconds=self.seconds + more + (joint.square - instead_of.square) * self.bend)


def simulate(
    scanner: Any,
    tree: RequestTree,
    outputs: np.ndarray,
    cost: Cost,
    *,
    capacity: int,
    fast: bool = True,
) -> Outcome:
    """Serve all requests of a tree.

    Args:
      scanner: see `scanner.py`; made by `compiled` if `fast`.
      outputs: int64 [requests], tokens that each answer has in truth.
      capacity: tokens of the KV pool; every request must fit into it alone.
      fast: compile with numba, which takes some ten seconds once a process and kind of scanner.
    """
    outputs = np.maximum(np.asarray(outputs, np.int64), 1)
    if len(outputs) and int((tree.prompt + outputs).max()) > capacity:
        raise ValueError(f"a request of {int((tree.prompt + outputs).max())} tokens, a pool of {capacity}")
    make = compiled if fast else _plain
    pool = make(SimulatedPool, tree.own, tree.parent, tree.attach, tree.alone, capacity)
    steps = make(
        SimulatedSteps,
        scanner,
        pool,
        tree.prompt,
        outputs,
        cost.token_seconds,
        cost.key_seconds,
        cost.step_seconds,
        cost.joint.linear,
        cost.joint.square,
        _SERIES,
    )
    steps.run()
    served = scanner.order
    needed = tree.prompt[served].sum() + (outputs[served] - 1).sum()
    return Outcome(
        steps.seconds,
        steps.clock,
        steps.compute,
        steps.memory,
        steps.computed,
        steps.cached,
        steps.computed - int(needed) + steps.cached,
        steps.preemptions,
        steps.smaller,
        steps.bend,
        np.array(steps.series),
    )


def practical_optimum(tree: RequestTree, outputs: np.ndarray, cost: Cost) -> float:
    """Seconds if the whole batch's compute and memory time overlapped as one step's do, prefixes computed once: the bound
    that BlendServe calls practical optimal. The first token of an answer comes with its prompt, so it needs no pass."""
    later = np.maximum(np.asarray(outputs, np.int64), 1) - 1
    tokens = tree.prompt.sum() - tree.shared_tokens + later.sum()
    reads = (tree.prompt * later + later * (later + 1) // 2).sum()
    return float(cost.joint(cost.compute(tokens), reads * cost.key_seconds))


def compiled(kind: type, *given: Any) -> Any:
    """An instance of `kind`, a class that numba's jitclass takes, compiled. Its attributes have the types that it gives them."""
    import numba
    from numba.experimental import jitclass

    key = kind, tuple(numba.typeof(value) for value in given)
    if key not in _COMPILED:
        spec = [(name, numba.typeof(value)) for name, value in vars(kind(*given)).items()]
        _COMPILED[key] = jitclass(spec)(kind)
    return _COMPILED[key](*given)


_COMPILED: dict[tuple, type] = {}


def _plain(kind: type, *given: Any) -> Any:
    return kind(*given)
