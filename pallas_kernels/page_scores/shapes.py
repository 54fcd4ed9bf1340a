"""Named shapes from real engines, shared by tests and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PagesShape:
    """Decoding rows over a paged pool; `kv_len` of each row in tokens."""

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    kv_len: tuple[int, ...]


SHAPES = {
    "pocket_8k": PagesShape(12, 4, 64, 16, (8192, 4096, 5000, 1, 0)),
    "pocket_32k": PagesShape(12, 4, 64, 16, (32768,)),
    "pocket_edges": PagesShape(12, 4, 64, 16, (15, 16, 17, 31, 32, 33, 0, 1)),
    "llama3_8b_8k": PagesShape(32, 8, 128, 16, (8192, 8191, 3000, 17)),
    "llama3_8b_page_32": PagesShape(32, 8, 128, 32, (4096, 4095, 33)),
    "llama2_7b_4k": PagesShape(32, 32, 128, 16, (4096, 1111)),
}

# Small enough for the simulator of the GPU.
SIMULATED = {
    "pocket_2k": PagesShape(12, 4, 64, 16, (2000, 33, 17, 0)),
    "llama3_8b_two_heads": PagesShape(8, 2, 128, 16, (1300, 1024)),
    "wide_group_page_32": PagesShape(20, 2, 128, 32, (2100, 31)),
}
