"""What an expert costs on the host, on the device and on the link between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Engine:
    """Time of one expert on the host or on the device: max(bytes / bandwidth, operations / rate).

    Attributes:
      flat: seconds to read the expert's weights, whatever the tokens (launch included).
      per_token: seconds of one token's multiplications where they, not memory, are the limit.
    """

    flat: float
    per_token: float

    def seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Of each expert by its number of tokens; 0 where it has none."""
        return np.where(tokens > 0, np.maximum(self.flat, self.per_token * tokens), 0.0)


@dataclass(frozen=True)
class Costs:
    """Of one expert's weights on one machine.

    Attributes:
      link: seconds that its weights take to the device.
      ask: seconds of a question to the host beside its work; infinite where host and device are the same cores.
    """

    host: Engine
    device: Engine
    link: float
    ask: float = float("inf")

    @property
    def apart(self) -> bool:
        """Whether host and device are different cores, so that both can work at the same time."""
        return bool(np.isfinite(self.ask))

    @property
    def break_even(self) -> float:
        """Tokens above which streaming beats the host, each by itself."""
        return (self.link + self.device.flat) / self.host.per_token
