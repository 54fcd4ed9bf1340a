"""Models: one decoder for all families, described by `ModelConfig`."""

from jaxinfer.models.config import ModelConfig, MoEConfig, RopeConfig
from jaxinfer.models.decoder import abstract, forward, init, logits, unstack
from jaxinfer.models.layers import Decoder
from jaxinfer.models.tensors import TensorSpec, ignored, storage_shapes, tensor_table

__all__ = [
    "Decoder",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "TensorSpec",
    "abstract",
    "forward",
    "ignored",
    "init",
    "logits",
    "storage_shapes",
    "tensor_table",
    "unstack",
]
