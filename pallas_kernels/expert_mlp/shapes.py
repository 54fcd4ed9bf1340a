"""Named shapes from real engines, shared by tests and bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertShape:
    """One expert_mlp call: T tokens, each to K of E experts of hidden width F."""

    tokens: int
    model_dim: int
    hidden_dim: int
    experts: int
    top_k: int


SHAPES = {
    "pocket_decode_1": ExpertShape(tokens=1, model_dim=512, hidden_dim=1024, experts=8, top_k=2),
    "pocket_decode_8": ExpertShape(tokens=8, model_dim=512, hidden_dim=1024, experts=8, top_k=2),
    "pocket_decode_64": ExpertShape(tokens=64, model_dim=512, hidden_dim=1024, experts=8, top_k=2),
    "pocket_prefill": ExpertShape(tokens=576, model_dim=512, hidden_dim=1024, experts=8, top_k=2),
    "olmoe_decode": ExpertShape(tokens=64, model_dim=2048, hidden_dim=1024, experts=16, top_k=4),
    "mixtral_slice": ExpertShape(tokens=16, model_dim=1024, hidden_dim=3584, experts=8, top_k=2),
}

ON_GPU = {
    "mixtral_8x7b_decode": ExpertShape(tokens=16, model_dim=4096, hidden_dim=14336, experts=8, top_k=2),
    "mixtral_8x7b_prefill": ExpertShape(tokens=2048, model_dim=4096, hidden_dim=14336, experts=8, top_k=2),
    "qwen3_30b_decode": ExpertShape(tokens=32, model_dim=2048, hidden_dim=768, experts=128, top_k=8),
    "pocket": ExpertShape(tokens=64, model_dim=128, hidden_dim=192, experts=8, top_k=2),
}

# Small enough for the simulator of the GPU: tiles of 64 and of 128 columns, one warpgroup and two.
SIMULATED = {
    "narrow": ExpertShape(tokens=5, model_dim=128, hidden_dim=192, experts=8, top_k=2),
    "wide": ExpertShape(tokens=3, model_dim=384, hidden_dim=128, experts=4, top_k=2),
    "wide_deep": ExpertShape(tokens=3, model_dim=512, hidden_dim=128, experts=4, top_k=2),
    "many_rows": ExpertShape(tokens=140, model_dim=256, hidden_dim=128, experts=2, top_k=2),
}
