"""Named shapes from real engines, shared by tests and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ListShape:
    """One page_attention call: `tokens` of each row, in lists of `lists` heads (1, kv_heads or q_heads)."""

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    tokens: tuple[int, ...]
    lists: int


SHAPES = {
    "pocket_2048": ListShape(12, 4, 64, 16, (2048, 2047, 700, 0), 4),
    "pocket_edges": ListShape(12, 4, 64, 16, (1, 15, 16, 17, 31, 32, 33, 0), 4),
    "pocket_dense": ListShape(12, 4, 64, 16, (8192, 3000, 1), 1),
    "pocket_paper": ListShape(12, 4, 64, 16, (512, 511, 3), 12),
    "llama3_8b_2048": ListShape(32, 8, 128, 16, (2048, 2041, 900), 8),
    "llama3_8b_page_32": ListShape(32, 8, 128, 32, (2048, 65, 33), 8),
    "llama2_7b_1024": ListShape(32, 32, 128, 16, (1024, 1009), 32),
}

# Small enough for the simulator of the GPU, long enough that every slot of the ring is used again.
SIMULATED = {
    "pocket": ListShape(12, 4, 64, 16, (330, 17, 0), 4),
    "llama3_8b_two_heads": ListShape(8, 2, 128, 16, (1000, 64), 2),
    "llama2_7b_two_heads": ListShape(2, 2, 128, 16, (700, 15), 2),
    "dense_page_32": ListShape(4, 2, 128, 32, (1500, 129), 1),
    "paper": ListShape(4, 2, 64, 16, (100, 3), 4),
}
