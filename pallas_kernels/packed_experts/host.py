"""packed_experts on arrays of numpy, outside of XLA: for records that stay on the host while the model runs elsewhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pallas_kernels._cpu.register import compile_function
from pallas_kernels.expert_mlp.cpu import ACTIVATION_CODES, MAX_WORKERS
from pallas_kernels.packed_experts.cpu import work_arrays
from pallas_kernels.packed_experts.layout import Record


class HostExperts:
    """Computes experts with threads of its own, without the GIL. One call at a time.

    Args:
      threads: that compute, the caller among them; None for all cores.

    Raises:
      NotImplementedError: an activation that the kernel does not know, or numba is missing.
    """

    def __init__(self, record: Record, *, activation: str, threads: int | None = None):
        if activation not in ACTIVATION_CODES:
            raise NotImplementedError(f"activation {activation!r}; one of {sorted(ACTIVATION_CODES)}")
        self.record = record
        self.threads = min(threads or os.cpu_count() or 1, MAX_WORKERS)
        self._constants = (
            np.array(ACTIVATION_CODES[activation], np.int32),
            np.array([*record.offsets, record.nbytes, record.group], np.int32),
        )
        self._code = _code(record.format)
        self._helpers = ThreadPoolExecutor(max(self.threads - 1, 1), thread_name_prefix="experts")

    def __call__(
        self, x: np.ndarray, records: np.ndarray, expert_ids: np.ndarray, expert_weights: np.ndarray
    ) -> np.ndarray:
        """See `api.packed_experts`; x float32 [T, D] -> float32 [T, D]. `records` may be mapped from a file."""
        tokens, top_k = expert_ids.shape
        record, experts = self.record, len(records)
        assert x.shape == (tokens, record.model_dim) and expert_weights.shape == expert_ids.shape
        assert records.dtype == np.uint8 and records.shape[1] == record.nbytes and records.flags.c_contiguous
        activation, offsets = self._constants
        arguments = [
            np.ascontiguousarray(x, np.float32),
            records,
            np.empty((experts, record.hidden_dim, 0), np.int8),
            np.ascontiguousarray(expert_ids, np.int32),
            np.ascontiguousarray(expert_weights, np.float32),
            activation,
            offsets,
        ]
        shapes = work_arrays(tokens, top_k, experts, record, self.threads)
        results = [np.empty(shape, dtype) for shape, dtype in shapes]
        frame = _Frame(arguments, results)
        block = self._code.prepare(frame.address)
        for _ in range(self.threads - 1):
            self._code.announce(block)
            self._helpers.submit(self._code.help, block)
        self._code.run(block)
        return results[0]

    def close(self) -> None:
        """Ends the threads."""
        self._helpers.shutdown()


class _Code:
    """The native functions of one format."""

    def __init__(self, format: str):
        from numba import types

        from pallas_kernels._cpu.tiles import publish
        from pallas_kernels.packed_experts import _native

        for dtype in {"float32", format}:
            publish(dtype)
        self._compiled: list[Any] = []

        def compiled(name: str) -> Callable[[int], int]:
            function = compile_function(getattr(_native, name), types.int64(types.int64))
            self._compiled.append(function)  # the machine code lives as long as this
            return function.ctypes

        self.prepare, self.announce = compiled("prepare"), compiled("announce")
        self.run, self.help = compiled(f"run_{format}"), compiled(f"help_{format}")


@functools.cache
def _code(format: str) -> _Code:
    try:
        return _Code(format)
    except ImportError as error:
        raise NotImplementedError(f"numba cannot be imported ({error})") from None


_HEAD, _OF_BUFFER = (
    17,
    6 + 4,
)  # words of a frame and the API table behind it, of a buffer with at most four dimensions


class _Frame:
    """A call frame as XLA would pass it, see `_cpu.frame`: what the native code reads of it, and nothing else."""

    def __init__(self, arguments: list[np.ndarray], results: list[np.ndarray]):
        self._kept = arrays = [*arguments, *results]
        self._words = np.empty(_HEAD + (1 + _OF_BUFFER) * len(arrays), np.int64)
        self.address = self._words.ctypes.data
        buffers = _HEAD + len(arrays)
        words = [0] * _HEAD
        words[2] = self._word(_HEAD - 1)  # an API table of no size: there is no pool
        words[(40 + 32) // 8] = self._word(_HEAD)
        words[(80 + 32) // 8] = self._word(_HEAD + len(arguments))
        words += [self._word(buffers + _OF_BUFFER * number) for number in range(len(arrays))]
        for array in arrays:
            begin = len(words)
            words += [0, 0, 0, array.ctypes.data, 0, self._word(begin + 6), *array.shape]
            words += [0] * (begin + _OF_BUFFER - len(words))
        self._words[:] = words

    def _word(self, place: int) -> int:
        return self.address + 8 * place
