"""How the weights of an expert are held, and how many bytes that takes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.models.config import ModelConfig

GROUP = 128  # consecutive inputs of an output that share a scale


@dataclass(frozen=True)
class ExpertFormat:
    """Attributes:
    name: "float32", "bfloat16", "int8" or "int4".
    bits: of one weight.
    scaled: whether every group of `GROUP` inputs of an output has a float32 scale.
    """

    name: str
    bits: int
    scaled: bool = False

    def matrix_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of one matrix, scales included."""
        return self.weight_bytes(inputs, outputs) + self.scale_bytes(inputs, outputs)

    def weight_bytes(self, inputs: int, outputs: int) -> int:
        return inputs * outputs * self.bits // 8

    def scale_bytes(self, inputs: int, outputs: int) -> int:
        return 4 * -(-inputs // GROUP) * outputs if self.scaled else 0


FORMATS = {
    format.name: format
    for format in (
        ExpertFormat("float32", 32),
        ExpertFormat("bfloat16", 16),
        ExpertFormat("int8", 8, scaled=True),
        ExpertFormat("int4", 4, scaled=True),
    )
}


def expert_bytes(config: ModelConfig, format: ExpertFormat) -> int:
    """Bytes of one expert: gate and up [D, 2F], down [F, D]."""
    assert config.moe is not None
    wide, width = config.hidden_size, config.moe.width
    return format.matrix_bytes(wide, 2 * width) + format.matrix_bytes(width, wide)


def expert_flops(config: ModelConfig) -> int:
    """Operations of one expert for one token, two a multiply-add."""
    assert config.moe is not None
    return 6 * config.hidden_size * config.moe.width
