"""Public face of matmul."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.matmul import xla


def matmul(x: jax.Array, w: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x @ w, accumulated in float32.

    x: [M, K], in w's type
    w: [K, N], float32 or bfloat16
    returns float32 [M, N]; from the CPU kernel a row's result does not depend on the other rows, not in one bit
    """
    implementations = {"cpu": _cpu, "xla": xla.matmul}
    if implementation is None and jax.default_backend() == "cpu" and not _kernel_pays(x, w):
        implementation = "xla"
    return dispatch("matmul", implementations, implementation, x, w)


def _kernel_pays(x, w):
    from pallas_kernels.matmul import cpu

    return cpu.pays(x.shape[0], w.shape[0], w.shape[1], w.dtype)


def _cpu(*args):
    from pallas_kernels.matmul import cpu

    return cpu.matmul(*args)
