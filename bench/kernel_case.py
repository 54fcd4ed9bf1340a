"""One call that a kernel and its twin are compared by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One call of a kernel.

    Attributes:
      call: from (implementation, arguments) to the output.
      meaningful: the part of an output that the kernel defines.
      floor: bytes that must move.
    """

    op: str
    shape: str
    call: Callable[[str, tuple], Any]
    arguments: tuple
    floor: float
    meaningful: Callable[[Any], list[np.ndarray]] = lambda out: [np.asarray(out, np.float64)]
