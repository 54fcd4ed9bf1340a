"""Public face of page_select."""

from typing import NamedTuple

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.page_select import xla


class Selected(NamedTuple):
    """The chosen pages of every row and choosing head, as positions in the row's page table.

    positions: int32 [S, H, W], ascending; what stands past `number` has no meaning but lies in [0, P)
    number: int32 [S, H]
    """

    positions: jax.Array
    number: jax.Array


def page_select(
    scores: jax.Array,
    pages: jax.Array,
    keep: jax.Array,
    *,
    width: int,
    first: int = 0,
    last: int = 0,
    scale: float = 1.0,
    top_p: float = 1.0,
    implementation: str | None = None,
) -> Selected:
    """The `keep` best pages of every row and head, exactly; of equal pages the earlier ones.

    Where G query heads choose together, a page ranks by the largest share that any of them would give it: the maximum
    over the group of scale * score - logsumexp of the head's scaled scores.

    scores: float32 [S, H, G, P], larger is better
    pages: int32 [S], how many of the P are the row's own; 0 is a padding row
    keep: int32 [S], how many to choose, at least first + last; all of them where that is no less than `pages`
    width: W, no less than any min(keep, pages) and at most P
    first, last: so many pages at either end are always chosen; they count
    scale: factor from scores to the logarithms of attention weights
    top_p: below 1, rows with more than `keep` pages choose only as many as hold this share of the weight that the
        scores stand for, at least first + last + 1 (after Twilight, arXiv 2502.02770)
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "cpu": _cpu, "xla": xla.page_select}
    settings = {"width": width, "first": first, "last": last, "scale": scale, "top_p": top_p}
    positions, count = dispatch(
        "page_select", implementations, implementation, scores, pages, keep, **settings
    )
    return Selected(positions, count)


def _cpu(*args, **kwargs):
    from pallas_kernels.page_select import cpu

    return cpu.page_select(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    from pallas_kernels.page_select import mosaic_gpu

    return mosaic_gpu.page_select(*args, **kwargs)
