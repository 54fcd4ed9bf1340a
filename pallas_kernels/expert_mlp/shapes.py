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
