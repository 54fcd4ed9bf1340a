"""Public face of kv_write."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.kv_write import xla


def kv_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: jax.Array | int,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes one key and one value per token into the pool, in place where the pool is donated or a loop carry.

    k_pages, v_pages: [L, N, Hkv, page, D]
    layer: int32 scalar, may be traced
    k, v: [T, Hkv, D], cast to the pool's dtype
    slots: int32 [T], page_id * page + offset; a negative slot skips the token. Slots of one call are distinct.
    returns (k_pages, v_pages)
    """
    implementations = {"cpu": _cpu, "xla": xla.kv_write}
    return dispatch("kv_write", implementations, implementation, k_pages, v_pages, layer, k, v, slots)


def _cpu(*args):
    from pallas_kernels.kv_write import cpu

    return cpu.kv_write(*args)
