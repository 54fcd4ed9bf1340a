"""Models: one decoder for all families, described by `ModelConfig`."""

from jaxinfer.models.config import ModelConfig, MoEConfig, RopeConfig
from jaxinfer.models.decoder import abstract, forward, init, logits, unstack
from jaxinfer.models.families import from_hugging_face, from_json, to_json
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
    "from_hugging_face",
    "from_json",
    "ignored",
    "init",
    "logits",
    "storage_shapes",
    "tensor_table",
    "to_json",
    "unstack",
]
