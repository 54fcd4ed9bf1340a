"""Named shapes from real engines, shared by tests and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SelectShape:
    """One page_select call: `pages` of each row, of which `keep` are chosen; group query heads choose together."""

    heads: int
    group: int
    pages: tuple[int, ...]
    keep: int
    first: int = 1
    last: int = 2


SHAPES = {
    "pocket_8k_1024": SelectShape(4, 3, (512, 300, 64, 10, 0), 64),
    "pocket_32k_2048": SelectShape(4, 3, (2048,), 128),
    "llama3_8b_32k_2048": SelectShape(8, 4, (2048, 2047, 1000), 128),
    "llama3_8b_128k_4096": SelectShape(8, 4, (8192,), 256),
    "llama2_7b_64k_2048": SelectShape(32, 1, (4096, 4095), 128),
    "paper_32k_2048": SelectShape(32, 1, (2048, 100), 128, first=0, last=0),
}

# Small enough for the simulator of the GPU: one for each width of its tile, with and without a group.
SIMULATED = {
    "one_head_2k": SelectShape(2, 1, (300, 40, 0), 70, first=0, last=1),
    "group_32k": SelectShape(1, 4, (2048, 130, 20), 128),
    "group_64k": SelectShape(1, 2, (3000,), 64),
    "one_head_128k": SelectShape(1, 1, (8000,), 128),
}
