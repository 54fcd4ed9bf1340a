"""Models: one decoder for all families, described by `ModelConfig`."""

from jaxinfer.models.config import ModelConfig, MoEConfig, RopeConfig
from jaxinfer.models.decoder import abstract, forward, init, logits, unstack
from jaxinfer.models.layers import Decoder

__all__ = [
    "Decoder",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "abstract",
    "forward",
    "init",
    "logits",
    "unstack",
]
