"""Public face of int4_matmul."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.int4_matmul import xla
from pallas_kernels.int4_matmul.matrix import PackedMatrix
from pallas_kernels.quantize.rows import QuantizedRows


def int4_matmul(
    x: QuantizedRows,
    w: PackedMatrix,
    group_sizes: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """x @ w.T: integers multiplied as integers and summed in int32, scales applied in float32.

    x: M rows; scales per row, or per row and as many groups as w has
    w: N rows. With 16-bit activations the low part is a float matmul over unpacked blocks
    group_sizes: int32 [E] for weights with an axis E in front: the first group_sizes[0] rows of x meet the first
        matrix, the next the second; rows after the last group give zeros
    returns float32 [M, N]. With integer activations, and on a CPU with float ones where nothing is in the high part, a row's
        result does not depend on the other rows, not in one bit (on Hopper: among up to 64 rows and without groups)
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "cpu": _cpu, "xla": xla.int4_matmul}
    return dispatch("int4_matmul", implementations, implementation, x, w, group_sizes)


def _cpu(*args):
    from pallas_kernels.int4_matmul import cpu

    return cpu.int4_matmul(*args)


def _mosaic_gpu(*args):
    from pallas_kernels.int4_matmul import mosaic_gpu

    return mosaic_gpu.int4_matmul(*args)
