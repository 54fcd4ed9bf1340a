"""Compiles a case in a process of its own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pallas_kernels._h200.cases import CASES
from pallas_kernels._h200.report import Failure, Kernel, check_instruction, check_shared, kernels_of


def compile_apart(name: str) -> tuple[list[Kernel], int]:
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
        check_shared(kernels, CASES[name].shared_kib)
        return kernels, int(done.stdout.split()[-1])
