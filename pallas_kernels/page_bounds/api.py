"""Public face of page_bounds."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.page_bounds import xla
from pallas_kernels.page_bounds.scaled import Bounds


def page_bounds(
    bounds: Bounds,
    layer: jax.Array | int,
    k: jax.Array,
    slots: jax.Array,
    *,
    page_size: int,
    implementation: str | None = None,
) -> Bounds:
    """Folds new keys into the bounds of their pages (Quest, arXiv 2406.10774, section 3.3), in place where donated.

    A page whose first slot is written starts anew: it may have belonged to another sequence. The bounds of a page
    that is not full are those of the keys it holds.

    bounds: [L, N, Hkv, 2, D], the channel-wise minimum (0) and maximum (1) of every page's keys; or ScaledBounds, the
        same in eight bits
    layer: int32 scalar, may be traced
    k: [T, Hkv, D] after rotation, as the pool holds them: of its dtype, or what its quantized keys stand for. float32
        keys are rounded outward where bounds have fewer digits, so that these hold all the same.
    slots: int32 [T] as for kv_write: page_id * page_size + offset, negative to skip the token; the tokens of one page
        follow each other in order, without another page between them
    returns bounds
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "cpu": _cpu, "xla": xla.page_bounds}
    return dispatch(
        "page_bounds", implementations, implementation, bounds, layer, k, slots, page_size=page_size
    )


def _cpu(*args, **kwargs):
    from pallas_kernels.page_bounds import cpu

    return cpu.page_bounds(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    from pallas_kernels.page_bounds import mosaic_gpu

    return mosaic_gpu.page_bounds(*args, **kwargs)
