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
