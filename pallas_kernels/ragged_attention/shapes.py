"""Named shapes from real engines, shared by tests and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """One ragged_attention call: `rows` is (query_len, kv_len) for each row."""

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    rows: tuple[tuple[int, int], ...]


def _decode(rows: int, shortest: int, longest: int) -> tuple[tuple[int, int], ...]:
    step = (longest - shortest) // max(rows - 1, 1)
    return tuple((1, shortest + i * step) for i in range(rows))


SHAPES = {
    "pocket_decode": AttentionShape(12, 4, 64, 16, _decode(64, 300, 1000)),
    "pocket_decode_16": AttentionShape(12, 4, 64, 16, _decode(16, 300, 1000)),
    "pocket_decode_long": AttentionShape(12, 4, 64, 16, ((1, 32768),)),
    "pocket_prefill": AttentionShape(12, 4, 64, 16, ((512, 512), (512, 2048), (512, 8192))),
    "pocket_mixed": AttentionShape(12, 4, 64, 16, ((256, 700), *_decode(32, 300, 1000))),
    "llama3_8b_decode": AttentionShape(32, 8, 128, 16, _decode(16, 500, 1500)),
    "llama3_8b_prefill": AttentionShape(32, 8, 128, 16, ((512, 2048),)),
}

# Prefill and mixed steps of real models, and the edges of what the Hopper kernel takes.
ON_GPU = {
    **{name: SHAPES[name] for name in ("pocket_prefill", "pocket_mixed", "llama3_8b_prefill")},
    "llama3_8b_chunks": AttentionShape(32, 8, 128, 16, ((1024, 1024), (512, 4096), (512, 16384))),
    "llama3_8b_page_32": AttentionShape(32, 8, 128, 32, ((2048, 2048),)),
    "llama2_7b_prefill": AttentionShape(32, 32, 128, 16, ((1024, 2048),)),
    "one_kv_head": AttentionShape(16, 1, 128, 16, ((512, 2048),)),
}

# Small enough for the simulator of the GPU: rows of none, one and many tokens, from the middle of a context too.
SIMULATED = {
    "pocket": AttentionShape(3, 1, 64, 16, ((0, 0), (1, 70), (45, 230))),
    "llama3_8b_two_heads": AttentionShape(8, 2, 128, 16, ((70, 70), (1, 33), (0, 0), (3, 500))),
    "page_32": AttentionShape(2, 2, 128, 32, ((1, 1), (130, 129 + 64))),
    "one_kv_head": AttentionShape(16, 1, 64, 16, ((9, 9), (17, 90))),
}
