"""python -m pallas_kernels._h200 [PART OF A NAME...]: compiles the cases, a process each, and prints what they take."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from pallas_kernels._h200.apart import compile_apart
from pallas_kernels._h200.cases import CASES
from pallas_kernels._h200.report import Failure, Kernel

COLUMNS = "{:<38} {:>9} {:>7} {:>9} {:>13} {:>11}"


def main(wanted: list[str]) -> int:
    names = [name for name in CASES if not wanted or any(part in name for part in wanted)]
    print(
        COLUMNS.format("kernel and shape", "registers", "spilled", "shared B", "blocks per SM", "temporary B")
    )
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, result in zip(names, pool.map(_compiled, names)):
            if isinstance(result, Failure):
                failed += 1
                print(f"{name:<38} FAILED: {result}", flush=True)
                continue
            kernels, temporary = result
            failed += any(kernel.spilled for kernel in kernels)
            for each in kernels:
                resources = (each.registers, each.spilled, each.shared_bytes, each.blocks_per_processor)
                print(COLUMNS.format(name, *resources, temporary), flush=True)
    print(f"{len(names)} compiled for the H200, {failed} failed")
    return 1 if failed or not names else 0


def _compiled(name: str) -> tuple[list[Kernel], int] | Failure:
    try:
        return compile_apart(name)
    except Failure as failure:
        return failure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
