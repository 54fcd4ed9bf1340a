"""Public face of kv_write."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.kv_write import xla
from pallas_kernels.packed_pages import PackedPages, pack

Pages = jax.Array | PackedPages


def kv_write(
    k_pages: Pages,
    v_pages: Pages,
    layer: jax.Array | int,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[Pages, Pages]:
    """Writes one key and one value per token into the pool, in place where the pool is donated or a loop carry.

    k_pages, v_pages: [L, N, Hkv, page, D], or both PackedPages
    layer: int32 scalar, may be traced
    k, v: [T, Hkv, D], cast to the pool's dtype, or packed as it is
    slots: int32 [T], page_id * page + offset; a negative slot skips the token. Slots of one call are distinct.
    returns (k_pages, v_pages)
    """
    if isinstance(k_pages, PackedPages) and isinstance(v_pages, PackedPages):
        (k_codes, k_words), (v_codes, v_words) = (
            pack(new, pages.bits(new.shape[-1])) for new, pages in ((k, k_pages), (v, v_pages))
        )
        codes = _write(k_pages.codes, v_pages.codes, layer, k_codes, v_codes, slots, implementation)
        k_old, v_old, k_new, v_new = (a[..., None] for a in (k_pages.words, v_pages.words, k_words, v_words))
        words = _write(k_old, v_old, layer, k_new, v_new, slots, implementation)
        return PackedPages(codes[0], words[0][..., 0]), PackedPages(codes[1], words[1][..., 0])
    return _write(k_pages, v_pages, layer, k, v, slots, implementation)


def _write(k_pages, v_pages, layer, k, v, slots, implementation):
    implementations = {"cpu": _cpu, "xla": xla.kv_write}
    return dispatch("kv_write", implementations, implementation, k_pages, v_pages, layer, k, v, slots)


def _cpu(*args):
    from pallas_kernels.kv_write import cpu

    return cpu.kv_write(*args)
