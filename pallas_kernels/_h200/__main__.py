"""python -m pallas_kernels._h200 [PART OF A NAME...]: compiles the cases, a process each, and prints what they take."""

import sys

from pallas_kernels._h200.apart import compile_apart
from pallas_kernels._h200.cases import CASES
from pallas_kernels._h200.report import Failure

COLUMNS = "{:<38} {:>9} {:>7} {:>9} {:>13} {:>11}"


def main(wanted: list[str]) -> int:
    names = [name for name in CASES if not wanted or any(part in name for part in wanted)]
    print(
        COLUMNS.format("kernel and shape", "registers", "spilled", "shared B", "blocks per SM", "temporary B")
    )
    failed = 0
    for name in names:
        try:
            kernels, temporary = compile_apart(name)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
