"""Decides, layer by layer, which of the missing experts the host computes and which the link brings to the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from jaxinfer.offload.latency import Costs
from jaxinfer.offload.timeline import Load, Split, seconds

Policy = Callable[[Load, Costs], Split]
FEW = 8  # missing experts up to which all subsets are searched, in about 0.1 ms


def fiddler(load: Load, costs: Costs) -> Split:
    """Algorithm 1 of the paper: an expert at a time, streamed where cpu_lat(s) > gpu_lat(s) + trans_lat.

    The latencies are the paper's: gpu_lat and trans_lat constant, cpu_lat one token's time times s.
    """
    host: list[int] = []
    stream: list[int] = []
    for expert, tokens in enumerate(load.tokens):
        if tokens == 0 or load.resident[expert]:
            continue
        slower_on_host = costs.host.flat * tokens > costs.device.flat + costs.link
        (stream if slower_on_host else host).append(expert)
    return Split(tuple(host), tuple(stream))


def balanced(load: Load, costs: Costs) -> Split:
    """Ours: the k missing experts with most tokens go to the link, the others to the host, with the k that is done
    first when host, link and device work at the same time.

    A transfer takes as long for every expert, so the one with most tokens takes most off the host; and the device gets
    longest work first, which is the best order where transfers are equal (Johnson's rule). A handful of experts does
    not divide evenly, and the device may hold the streamed ones up: there the best of all subsets is found. Where the
    host's cores are the device's, each expert goes where it takes less of them.
    """
    missing = load.missing
    if not missing.size:
        return Split()
    tokens = load.tokens[missing]
    if not costs.apart:
        quicker = costs.link + costs.device.seconds(tokens) < costs.host.seconds(tokens)
        return _split(missing, np.flatnonzero(quicker).tolist())
    resident = float(costs.device.seconds(load.tokens[load.resident]).sum())
    choices = [_split(missing, range(_best_prefix(tokens, resident, costs))), fiddler(load, costs)]
    best, split = min(((seconds(load, split, costs), split) for split in choices), key=lambda pair: pair[0])
    if len(missing) <= FEW and (subset := _best_subset(tokens, best, resident, costs)) is not None:
        return _split(missing, subset)
    return split


def stream(load: Load, costs: Costs) -> Split:
    """Every missing expert goes to the device, as systems do that offload weights alone."""
    return Split(stream=tuple(int(expert) for expert in load.missing))


def host(load: Load, costs: Costs) -> Split:
    """The host computes every missing expert."""
    return Split(host=tuple(int(expert) for expert in load.missing))


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {"balanced": balanced, "fiddler": fiddler, "stream": stream, "host": host}
)


def _best_prefix(tokens: np.ndarray, resident: float, costs: Costs) -> int:
    """How many of the experts, from the first, to stream; `resident` is the device's time for those it has."""
    on_host = costs.host.seconds(tokens)
    left = np.concatenate(([on_host.sum()], on_host.sum() - np.cumsum(on_host)))
    # The device is done with the first k at the latest of: busy all the time from some arrival j <= k on.
    compute = np.cumsum(costs.device.seconds(tokens))
    arrivals = costs.link * np.arange(1, len(tokens) + 1) - np.concatenate(([0.0], compute[:-1]))
    ends = np.concatenate(([resident], compute + np.maximum.accumulate(np.maximum(arrivals, resident))))
    return int(np.argmin(np.maximum(left, ends)))


def _best_subset(tokens: np.ndarray, best: float, resident: float, costs: Costs) -> list[int] | None:
    """Which of the experts to stream so that all is done before `best`, as early as possible; None if nothing is."""
    on_host, on_device = costs.host.seconds(tokens).tolist(), costs.device.seconds(tokens).tolist()
    found: list[int] | None = None

    def search(place: int, host: float, device: float, streamed: list[int]) -> None:
        nonlocal best, found
        if max(host, device) >= best:
            return
        if place == len(on_host):
            best, found = max(host, device), streamed
            return
        arrival = costs.link * (len(streamed) + 1)
        search(place + 1, host, max(device, arrival) + on_device[place], [*streamed, place])
        search(place + 1, host + on_host[place], device, streamed)

    search(0, 0.0, resident, [])
    return found


def _split(missing: np.ndarray, streamed: Sequence[int]) -> Split:
    stream = tuple(int(missing[place]) for place in streamed)
    return Split(tuple(int(expert) for expert in missing if expert not in stream), stream)
