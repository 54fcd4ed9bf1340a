"""What a machine can do: rate of matrix products, memory bandwidth, and how far the two overlap."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.schedule.kept import kept

_ONE_BY_ONE = 0.75  # of the smaller side's time is left of it: what may be gained is no more than what measuring it may err by


@dataclass(frozen=True)
class Joint:
    """Time of `compute` and `memory` seconds of work run together: max + min (linear + square min / max).

    Attributes:
      linear: 1 is one after the other, 0 is perfect overlap, 0.3 is what a good overlapping kernel reaches.
      square: bends the line, for fits.

    Raises:
      ConfigError: a joint time that some work would shorten.
    """

    linear: float = 0.3
    square: float = 0.0

    def __post_init__(self):
        if not (self.linear >= 0 and 0 <= self.linear + self.square <= 1):
            raise ConfigError(f"joint time: {self} must stay between max and sum")

    def __call__(self, compute, memory):
        high, low = np.maximum(compute, memory), np.minimum(compute, memory)
        part = np.divide(low, high, out=np.zeros(np.shape(high)), where=np.asarray(high) > 0)
        return high + low * (self.linear + self.square * part)

    @property
    def overlaps(self) -> bool:
        """Whether work of equal size on both sides takes clearly less time together than one after the other."""
        return self.linear + self.square < _ONE_BY_ONE

    @classmethod
    def fit(cls, measured: Sequence[tuple[float, float, float]]) -> Joint:
        """Least squares over (compute, memory, joint) seconds, kept between max and sum."""
        if not measured:
            raise ConfigError("joint time: no measurements to fit")
        compute, memory, joint = np.asarray(measured, float).T
        high, low = np.maximum(compute, memory), np.minimum(compute, memory)
        terms = np.stack([low, low * low / high], axis=1)
        extra = np.clip(joint - high, 0, low)
        linear, square = np.linalg.lstsq(terms, extra, rcond=None)[0]
        linear = float(np.clip(linear, 0, 1))
        return cls(linear, float(np.clip(square, -linear, 1 - linear)))


SUM, MAX, PRACTICAL = Joint(1.0), Joint(0.0), Joint(0.3)


@dataclass(frozen=True, kw_only=True)
class MachineProfile:
    """Attributes:
      flops: operations a second that large matrix products reach.
      bandwidth: bytes a second that attention over a long context reaches.
      link: bytes a second from the host to the device.
      memory: bytes of device memory.

    Raises:
      ConfigError: a rate that is not finite and positive.
    """

    flops: float
    bandwidth: float
    link: float = 25e9
    memory: float = math.inf
    joint: Joint = PRACTICAL

    def __post_init__(self):
        for name in ("flops", "bandwidth", "link", "memory"):
            value = getattr(self, name)
            if not value > 0 or (name != "memory" and math.isinf(value)):
                raise ConfigError(f"machine profile: {name} = {value!r} must be positive and finite")


A100 = MachineProfile(flops=0.75 * 312e12, bandwidth=0.85 * 2039e9, memory=80e9)
H200 = MachineProfile(flops=0.70 * 989e12, bandwidth=0.85 * 4800e9, memory=141e9)


def measured(dtype: str = "float32", *, cache: str | os.PathLike | None = None) -> MachineProfile:
    """The profile of this process's first device, measured once a machine and kept in the user's cache folder.

    Args:
      cache: another folder to keep it in.
    """
    import jax

    from jaxinfer.schedule.measure import measure

    device = f"{jax.devices()[0].device_kind}-{os.cpu_count()}-{dtype}"
    kind = "".join(c if c.isalnum() else "-" for c in device)
    make = functools.partial(measure, dtype)
    return kept(f"profile-{kind}", make, write=asdict, read=_of, folder=cache)


def _of(values: dict[str, Any]) -> MachineProfile:
    return MachineProfile(**values | {"joint": Joint(**values["joint"])})
