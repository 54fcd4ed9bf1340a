"""Named shapes from real engines, shared by tests, compiler checks and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LowBitShape:
    """One int4_matmul call: M rows times a matrix [N, K] of groups and outliers; rows go to experts where there are some."""

    rows: int
    inputs: int
    outputs: int
    group: int = 128
    outliers: int = 128
    experts: int = 0


SHAPES = {
    "llama110m_qkv": LowBitShape(1, 768, 1280),
    "llama110m_gate_up": LowBitShape(8, 768, 4096),
    "llama110m_down": LowBitShape(3, 2048, 768),
    "llama110m_prefill": LowBitShape(70, 768, 1280),
    "pocket_experts": LowBitShape(9, 128, 256, 32, 32, 8),
    "pocket_qkv": LowBitShape(2, 128, 512, 16, 16),
    "mixtral_slice": LowBitShape(20, 1024, 512, 128, 128, 4),
}

# Compiled for the H200: what a block holds differs by its rows.
ON_GPU = {
    "llama3_8b_down_1": LowBitShape(1, 14336, 4096),
    "llama3_8b_down_32": LowBitShape(32, 14336, 4096),
    "llama3_8b_down_2048": LowBitShape(2048, 14336, 4096),
    "mixtral_gate_up": LowBitShape(64, 4096, 28672, experts=8),
}
# In the simulator: several parts, a tail of rows, every slot of the ring used again, experts without rows.
SIMULATED = {
    "parts": LowBitShape(5, 1152, 128),
    "rows": LowBitShape(70, 1152, 64),
    "plain": LowBitShape(16, 1024, 64, outliers=0),
    "experts": LowBitShape(40, 640, 64, experts=3),
    "plain_experts": LowBitShape(21, 1280, 64, outliers=0, experts=2),
}
