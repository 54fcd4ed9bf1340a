"""Public face of page_scores."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.page_bounds import Bounds
from pallas_kernels.page_scores import xla


def page_scores(
    q: jax.Array,
    bounds: Bounds,
    layer: jax.Array | int,
    page_table: jax.Array,
    kv_len: jax.Array,
    *,
    page_size: int,
    spread: float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """sum_d max(q_d * min_d, q_d * max_d) for every page of a row (Quest, arXiv 2406.10774, equation 1).

    No key of the page can score more: q.k <= this, up to the rounding of a float32 sum. That is the score of the middle
    of the page's range plus sum_d |q_d| * (max_d - min_d) / 2, of which a smaller `spread` takes only that share: an
    estimate that is no bound, as no key is at the edge in all channels at once.

    q: [S, Hq, D], one decoding token per row
    bounds: [L, N, Hkv, 2, D], see page_bounds; Hq % Hkv == 0, query head h reads kv head h // (Hq // Hkv)
    layer: int32 scalar, may be traced
    page_table: int32 [S, P], the pages of row s in order
    kv_len: int32 [S], at most P * page_size; 0 is a padding row
    spread: in [0, 1]
    returns float32 [S, Hq, P]; what stands past a row's last page has no meaning
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "cpu": _cpu, "xla": xla.page_scores}
    args = (q, bounds, layer, page_table, kv_len)
    return dispatch("page_scores", implementations, implementation, *args, page_size=page_size, spread=spread)


def _cpu(*args, **kwargs):
    from pallas_kernels.page_scores import cpu

    return cpu.page_scores(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    from pallas_kernels.page_scores import mosaic_gpu

    return mosaic_gpu.page_scores(*args, **kwargs)
