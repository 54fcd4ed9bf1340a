"""Named shapes from real engines, shared by tests and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BoundsShape:
    """One page_bounds call; `runs` is (first position, tokens) of each row that writes."""

    layers: int
    pages: int
    kv_heads: int
    page_size: int
    head_dim: int
    runs: tuple[tuple[int, int], ...]


SHAPES = {
    "pocket_decode": BoundsShape(4, 512, 4, 16, 64, tuple((300 + 5 * i, 1) for i in range(64))),
    "pocket_chunks": BoundsShape(4, 512, 4, 16, 64, ((0, 512), (512, 300), (807, 9), (15, 1), (16, 1))),
    "llama3_8b_decode": BoundsShape(2, 256, 8, 16, 128, tuple((15 + i, 1) for i in range(32))),
    "llama3_8b_page_32": BoundsShape(2, 128, 8, 32, 128, ((0, 70), (31, 2), (64, 1))),
    "tiny": BoundsShape(3, 9, 2, 8, 8, ((0, 17), (7, 2), (5, 1))),
}

# Small enough for the simulator of the GPU.
SIMULATED = {
    "head_128": BoundsShape(2, 16, 2, 16, 128, ((0, 20), (31, 2), (16, 1), (5, 1))),
    "head_64_page_32": BoundsShape(2, 8, 2, 32, 64, ((0, 40), (31, 2), (5, 1))),
}
