"""One program that is compiled for the H200."""

from collections.abc import Callable
from dataclasses import dataclass

Array = tuple[tuple[int, ...], str]
LAYERS, POOL_PAGES = 2, 4096  # of the pools in the cases


@dataclass(frozen=True)
class Case:
    """One program: a function and the shapes and dtypes of its arguments.

    Attributes:
      in_place: so many leading arguments are donated and must not be copied.
      instruction: regular expression of one that the kernel must have.
      shared_kib: so much shared memory its kernels take at most.
    """

    run: Callable
    arguments: tuple[Array, ...]
    in_place: int = 0
    instruction: str = ""
    shared_kib: int = 227
