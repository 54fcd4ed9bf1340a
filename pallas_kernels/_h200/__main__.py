"""python -m pallas_kernels._h200 [PART OF A NAME...]: compiles the cases, a process each, and prints what they take."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pallas_kernels._h200.cases import CASES
from pallas_kernels._h200.report import Failure, Kernel, check_instruction, kernels_of

COLUMNS = "{:<38} {:>9} {:>7} {:>9} {:>13} {:>11}"


def main(wanted: list[str]) -> int:
    names = [name for name in CASES if not wanted or any(part in name for part in wanted)]
    print(
        COLUMNS.format("kernel and shape", "registers", "spilled", "shared B", "blocks per SM", "temporary B")
    )
    failed = 0
    for name in names:
        try:
            kernels, temporary = _compile_apart(name)
        except Failure as failure:
            failed += 1
            print(f"{name:<38} FAILED: {failure}")
            continue
        failed += any(kernel.spilled for kernel in kernels)
        for kernel in kernels:
            resources = (kernel.registers, kernel.spilled, kernel.shared_bytes, kernel.blocks_per_processor)
            print(COLUMNS.format(name, *resources, temporary), flush=True)
    print(f"{len(names)} compiled for the H200, {failed} failed")
    return 1 if failed or not names else 0


def _compile_apart(name: str) -> tuple[list[Kernel], int]:
    """The kernels of a case and its temporary bytes. A failing compiler may end its process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": folder}
        command = [sys.executable, "-m", "pallas_kernels._h200.compile", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise Failure(lines[-1] if lines else f"exit status {done.returncode}")
        kernels = kernels_of(Path(folder))
        check_instruction(Path(folder), CASES[name].instruction)
        return kernels, int(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
