"""The numba side of kv_write."""

from pallas_kernels._cpu.frame import answers_metadata, argument, dimension, result
from pallas_kernels._cpu.memory import copy_bytes, jit, load_i32


def handler(frame):
    """Arguments: k_pages, v_pages, k, v, layer, slots, bytes of one row; results: the pools, aliased."""
    if not answers_metadata(frame):
        _write_all(frame)
    return 0


@jit
def _write_all(frame):
    pages, heads, page = dimension(frame, 0, 1), dimension(frame, 0, 2), dimension(frame, 0, 3)
    layer = load_i32(argument(frame, 4))
    slots, tokens = argument(frame, 5), dimension(frame, 5, 0)
    row_bytes = load_i32(argument(frame, 6))
    layer_bytes = pages * heads * page * row_bytes
    for which in range(2):
        pool, new = result(frame, which) + layer * layer_bytes, argument(frame, 2 + which)
        for token in range(tokens):
            slot = load_i32(slots + 4 * token)
            if slot >= 0 and slot < pages * page:
                page_id = slot // page
                offset = slot - page_id * page
                for head in range(heads):
                    to = pool + ((page_id * heads + head) * page + offset) * row_bytes
                    copy_bytes(to, new + (token * heads + head) * row_bytes, row_bytes)
