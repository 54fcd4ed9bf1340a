"""Seconds that requests and steps ask of the two resources of a machine: compute, and memory traffic.

BlendServe's performance model (arXiv 2411.16102, section 4): the compute of a request grows with the tokens that go through
the weights, its memory time with the keys and values that its decode steps read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.schedule.demand import DemandModel, Span
from jaxinfer.schedule.profile import PRACTICAL, Joint, MachineProfile

_FAR = 1 << 24  # a position beyond every sliding window and token budget
_MANY = 1 << 16  # tokens, which between them visit every expert


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What work costs on one machine.

    Attributes:
      token_seconds: compute of one token.
      key_seconds: memory time of reading one token's keys and values, of all layers.
      step_seconds: least compute time of a step, in which all weights are read once.
      read_limit, read_slope: a decoding token reads all keys up to `read_limit`, and that share of those beyond, such as with
        sliding windows, or with Quest, whose dense layers and bounds grow on; a limit of 0 is none.
      joint: how long compute and memory take together.

    Raises:
      ConfigError: a cost that is not finite and positive (the floor may be 0).
    """

    token_seconds: float
    key_seconds: float
    step_seconds: float = 0.0
    read_limit: float = 0.0
    read_slope: float = 0.0
    joint: Joint = PRACTICAL

    def __post_init__(self):
        for name in ("token_seconds", "key_seconds", "step_seconds"):
            value = getattr(self, name)
            if not (np.isfinite(value) and (value > 0 or (name == "step_seconds" and value == 0))):
                raise ConfigError(f"cost: {name} = {value!r} is not a positive number of seconds")

    @classmethod
    def of(cls, demand: DemandModel, profile: MachineProfile) -> Cost:
        """From what a model's steps ask for: grouped heads, the experts that a token visits, all weights once a step, those that
        are not on the device over the host's link."""
        first, second, far, farther = (
            demand.step([Span(start, 1, sparse=True)]) for start in (0, 1, _FAR, 2 * _FAR)
        )
        key = second.kv_bytes - first.kv_bytes or first.kv_bytes
        reads = (far.kv_bytes - first.kv_bytes) / key
        slope = (farther.kv_bytes - far.kv_bytes) / key / _FAR
        everything = demand.step([Span(0, _MANY)])
        return cls(
            token_seconds=first.flops / profile.flops,
            key_seconds=key / profile.bandwidth,
            step_seconds=max(
                everything.weight_bytes / profile.bandwidth, everything.link_bytes / profile.link
            ),
            read_limit=max((reads - slope * _FAR) / (1 - slope), 1.0) if slope < 1 else 0.0,
            read_slope=min(slope, 1.0),
            joint=profile.joint,
        )

    @classmethod
    def paper(
        cls,
        *,
        parameters: float,
        kv_width: int,
        layers: int,
        flops: float,
        bandwidth: float,
        joint: Joint = PRACTICAL,
    ) -> Cost:
        """The plain formulae: 2 operations a parameter and token, 4 bytes a KV channel, layer and token (fp16), weights free."""
        if not (flops > 0 and bandwidth > 0):
            raise ConfigError(f"profile: {flops} FLOP/s and {bandwidth} B/s must both be positive")
        return cls(
            token_seconds=2.0 * parameters / flops,
            key_seconds=4.0 * kv_width * layers / bandwidth,
            joint=joint,
        )

    def compute(self, tokens):
        """Seconds of compute; `tokens` go through the model, those found in the prefix cache do not count."""
        return np.multiply(tokens, self.token_seconds)

    def memory(self, prompt, output):
        """Seconds of reading keys and values while `output` tokens follow `prompt` tokens: p d + d^2 / 2 reads."""
        return self.reads(prompt, output) * self.key_seconds

    def reads(self, prompt, output) -> np.ndarray:
        prompt, output = np.asarray(prompt, float), np.asarray(output, float)
        whole = prompt * output + output * output / 2
        if not self.read_limit:
            return whole
        growing = np.clip(self.read_limit - prompt, 0, output)  # tokens that still see everything
        near = prompt * growing + growing * growing / 2
        near = near + (output - growing) * self.read_limit * (prompt + output > 0)
        return near + self.read_slope * (whole - near)

    def density(self, computed, prompt, output):
        """Compute over memory; infinite where nothing is read."""
        memory = self.memory(prompt, output)
        return np.divide(
            self.compute(computed),
            memory,
            out=np.full(np.shape(memory), np.inf),
            where=np.asarray(memory) > 0,
        )
