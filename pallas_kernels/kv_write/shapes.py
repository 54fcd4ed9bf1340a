"""Named shapes from real engines, shared by tests and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WriteShape:
    """One kv_write call: T tokens into a pool of L layers and N pages."""

    layers: int
    pages: int
    kv_heads: int
    page_size: int
    head_dim: int
    tokens: int


SHAPES = {
    "pocket_decode": WriteShape(layers=4, pages=512, kv_heads=4, page_size=16, head_dim=64, tokens=64),
    "pocket_prefill": WriteShape(layers=4, pages=512, kv_heads=4, page_size=16, head_dim=64, tokens=2048),
    "llama3_8b_decode": WriteShape(layers=2, pages=256, kv_heads=8, page_size=16, head_dim=128, tokens=64),
    "tiny": WriteShape(layers=3, pages=9, kv_heads=2, page_size=8, head_dim=8, tokens=17),
}
