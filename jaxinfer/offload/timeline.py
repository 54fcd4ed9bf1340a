"""Simulates one layer: host, link and device work at the same time, unless host and device are the same cores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxinfer.offload.latency import Costs


@dataclass(frozen=True)
class Load:
    """What a step asks of one layer's experts.

    Attributes:
      tokens: int [E], visits of each expert; 0 where nobody asks for it.
      resident: bool [E], those whose weights are on the device.
    """

    tokens: np.ndarray
    resident: np.ndarray

    @property
    def missing(self) -> np.ndarray:
        """Experts that are asked for and not on the device, those with most tokens first; ties in their order."""
        wanted = np.flatnonzero((self.tokens > 0) & ~self.resident)
        return wanted[np.argsort(-self.tokens[wanted], kind="stable")]


@dataclass(frozen=True)
class Split:
    """Who computes the experts that are not resident. The resident ones are the device's.

    Attributes:
      host: experts that the host computes.
      stream: experts whose weights go to the device, in this order.
    """

    host: tuple[int, ...] = ()
    stream: tuple[int, ...] = ()


def seconds(load: Load, split: Split, costs: Costs) -> float:
    """When the last of the three is done.

    The host computes its experts one after the other. The link carries one expert after the other. The device
    computes the resident ones first, then each streamed one as soon as it is there.
    """
    if not costs.apart:
        return serial_seconds(load, split, costs)
    return max(host_seconds(load, split, costs), device_seconds(load, split, costs))


def host_seconds(load: Load, split: Split, costs: Costs) -> float:
    """Until the host is done."""
    return float(costs.host.seconds(load.tokens[list(split.host)]).sum())


def device_seconds(load: Load, split: Split, costs: Costs) -> float:
    """Until the device is done with its own experts and the streamed ones."""
    device = costs.device.seconds(load.tokens[load.resident]).sum()
    streamed = costs.device.seconds(load.tokens[list(split.stream)])
    for number, compute in enumerate(streamed, start=1):
        device = max(device, number * costs.link) + compute
    return float(device)


def worth_ahead(load: Load, split: Split, following: Load, costs: Costs) -> int:
    """How many experts that the following layer is thought to miss to bring while the host computes for this one: so
    many, those with most tokens first, that this layer is delayed by less than what they spare the host in the next one,
    which counts for half, as it is a guess.
    """
    slack = host_seconds(load, split, costs) - device_seconds(load, split, costs)
    spared = np.cumsum(costs.host.seconds(following.tokens[following.missing]))
    delays = costs.link * np.arange(1, len(spared) + 1) - slack
    return int(np.logical_and.accumulate(delays < spared / 2).sum())


def serial_seconds(load: Load, split: Split, costs: Costs) -> float:
    """The same where nothing overlaps, as in Fiddler's released code."""
    alone = costs.host.seconds(load.tokens[list(split.host)]).sum()
    streamed = costs.device.seconds(load.tokens[list(split.stream)]).sum() + costs.link * len(split.stream)
    return float(alone + streamed + costs.device.seconds(load.tokens[load.resident]).sum())
