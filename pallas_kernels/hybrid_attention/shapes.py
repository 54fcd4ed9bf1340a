"""Named mixed steps, shared by tests and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MixedShape:
    """`chunks` is (query_len, kv_len) of each prefill row, `decodes` the tokens in the list of each decoding row.

    `lists` is 1 for dense decoding and kv_heads for chosen pages.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    chunks: tuple[tuple[int, int], ...]
    decodes: tuple[int, ...]
    lists: int = 1


SHAPES = {
    "pocket": MixedShape(12, 4, 64, 16, ((512, 2048),), (3000, 1500, 700, 60)),
    "llama3_8b_balanced": MixedShape(32, 8, 128, 16, ((2048, 2048),), (2048,) * 64),
    "llama3_8b_chunk": MixedShape(32, 8, 128, 16, ((512, 16384),), (8192,) * 32),
    "llama3_8b_quest": MixedShape(32, 8, 128, 16, ((1024, 4096),), (2048,) * 64, 8),
    "llama3_8b_page_32": MixedShape(32, 8, 128, 32, ((1024, 4096),), (4096,) * 32),
    "llama2_7b": MixedShape(32, 32, 128, 16, ((1024, 1024),), (1024,) * 16),
}

# Small enough for the simulator of the GPU: both roles, one alone, or none at all.
SIMULATED = {
    "both": MixedShape(4, 2, 64, 16, ((40, 70), (3, 130)), (300, 17)),
    "chosen": MixedShape(4, 2, 128, 32, ((20, 20),), (130, 64), 2),
    "prefill_alone": MixedShape(4, 1, 64, 16, ((40, 70),), ()),
    "decode_alone": MixedShape(3, 1, 64, 16, (), (300, 17)),
    "nothing": MixedShape(2, 1, 64, 16, (), ()),
}

# The same for packed pools, with their bits: lists of all pages and of chosen ones.
PACKED = {
    "dense_int8": (MixedShape(2, 1, 64, 16, ((20, 50),), (130,)), 8),
    "dense_int4": (MixedShape(2, 1, 128, 16, ((20, 50),), (130,)), 4),
    "chosen_int4": (MixedShape(4, 2, 128, 32, ((20, 20),), (130,), 2), 4),
}
