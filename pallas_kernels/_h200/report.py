"""Reads what the compiler leaves about a kernel in MOSAIC_GPU_DUMP_TO."""

import re
from dataclasses import dataclass
from pathlib import Path

# Of a Hopper processor: registers, bytes of shared memory, and what a block takes of it beside its own.
REGISTERS, SHARED_BYTES, BLOCK_OVERHEAD = 65536, 233472, 1024
GRANULE = 8  # registers are handed out to warps by 256, that is 8 to a thread


class Failure(Exception):
    """Why a kernel does not pass."""


@dataclass(frozen=True)
class Kernel:
    """Resources of one kernel: registers of a thread, bytes spilled to memory, bytes of shared memory, threads of a block."""

    registers: int
    spilled: int
    shared_bytes: int
    threads: int

    @property
    def blocks_per_processor(self) -> int:
        by_registers = REGISTERS // (-(-self.registers // GRANULE) * GRANULE * self.threads)
        return min(by_registers, SHARED_BYTES // (self.shared_bytes + BLOCK_OVERHEAD))


def kernels_of(folder: Path) -> list[Kernel]:
    """Raises Failure where there is none, or a report that this does not understand."""
    reports = sorted(folder.glob("*.ptxas"))
    if not reports:
        raise Failure("no Mosaic kernel was compiled")
    suffixes = (".ptxas", ".resources.txt", ".ptx")
    return [read(*(path.with_suffix(suffix).read_text() for suffix in suffixes)) for path in reports]


def check_instruction(folder: Path, pattern: str) -> None:
    """Raises Failure where no kernel has an instruction that matches the regular expression."""
    if not any(re.search(pattern, path.read_text()) for path in folder.glob("*.ptx")):
        raise Failure(f"has no instruction {pattern}")


def check_shared(kernels: list[Kernel], kib: int) -> None:
    """Raises Failure where a kernel takes more shared memory than its description says."""
    most = max(kernel.shared_bytes for kernel in kernels)
    if most > kib * 1024:
        raise Failure(f"takes {most} bytes of shared memory, more than {kib} KiB")


def read(assembler: str, resources: str, code: str) -> Kernel:
    registers = re.search(r"Used (\d+) registers", assembler)
    spilled = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", assembler
    )
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
    threads = re.search(r"\.maxntid (\d+), 1, 1", code)
    if not (registers and spilled and shared and threads):
        raise Failure(f"the compiler's report reads differently: {assembler[:200]!r}, {resources[:200]!r}")
    return Kernel(int(registers[1]), max(map(int, spilled.groups())), int(shared[1]), int(threads[1]))
