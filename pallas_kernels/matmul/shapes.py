"""Named shapes from real engines, shared by tests and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MatmulShape:
    """One matmul call: x [M, K] times w [K, N]."""

    rows: int
    depth: int
    columns: int


SHAPES = {
    "llama110m_qkv": MatmulShape(16, 768, 1280),
    "llama110m_out": MatmulShape(16, 768, 768),
    "llama110m_gate_up": MatmulShape(16, 768, 4096),
    "llama110m_down": MatmulShape(16, 2048, 768),
    "llama110m_head": MatmulShape(16, 768, 32000),
    "llama3_8b_down": MatmulShape(8, 14336, 4096),
}
