"""Reads memory as fast as the machine can: what kernels that wait for memory are held against."""

from __future__ import annotations

import threading

import numpy as np

from pallas_kernels._cpu.code import LANES
from pallas_kernels._cpu.memory import jit
from pallas_kernels._cpu.vector import prefetch_line, vadd, vload, vreduce_add, vsplat

_STEP = 256  # bytes between looks at what to ask for
_AHEAD = 4096
_VECTOR = 4 * LANES


@jit
def _read(address, count):
    a, b, c, d = vsplat(0.0), vsplat(0.0), vsplat(0.0), vsplat(0.0)
    for at in range(address, address + count, _STEP):
        for line in range(0, _STEP, 64):
            prefetch_line(at + _AHEAD + line)
        for part in range(0, _STEP, 4 * _VECTOR):
            a = vadd(a, vload(at + part))
            b = vadd(b, vload(at + part + _VECTOR))
            c = vadd(c, vload(at + part + 2 * _VECTOR))
            d = vadd(d, vload(at + part + 3 * _VECTOR))
    return vreduce_add(vadd(vadd(a, b), vadd(c, d)))


def read_all(data: np.ndarray, threads: int) -> None:
    """Reads every byte of an array, each thread a part of it (up to the last 256 bytes)."""
    share = data.nbytes // threads // _STEP * _STEP
    parts = [(data.ctypes.data + share * thread, share) for thread in range(threads)]
    helpers = [threading.Thread(target=_read, args=part) for part in parts[1:]]
    for helper in helpers:
        helper.start()
    _read(*parts[0])
    for helper in helpers:
        helper.join()
