"""Named shapes from real engines, shared by tests, compiler checks and bench."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class QuantizeShape:
    """One quantize call: M rows of K channels.

    Attributes:
      before: what is computed on the way; gated rows come in order, the others are reordered.
      bits, group, outliers: as in `quantize`; activations of 4 bits are clipped at 0.9.
    """

    rows: int
    channels: int
    before: Literal["plain", "normed", "gated"]
    bits: int = 8
    group: int = 0
    outliers: int = 128

    @property
    def settings(self) -> dict[str, Any]:
        clip = 0.9 if self.bits == 4 else 1.0
        return {"bits": self.bits, "group": self.group, "outliers": self.outliers, "clip": clip}


# Llama-3-8B's widths, by mode; one register tile of groups or two.
ON_GPU = {
    "llama3_8b_norm_1": QuantizeShape(1, 4096, "normed"),
    "llama3_8b_norm_2048": QuantizeShape(2048, 4096, "normed"),
    "llama3_8b_norm_w4a4": QuantizeShape(64, 4096, "normed", 4, 128),
    "llama3_8b_norm_w8a8": QuantizeShape(64, 4096, "normed", outliers=4096),
    "llama3_8b_out": QuantizeShape(64, 4096, "plain"),
    "llama3_8b_down": QuantizeShape(64, 14336, "gated"),
    "llama3_8b_down_w4a4": QuantizeShape(64, 14336, "gated", 4, 128),
    "llama2_7b_down": QuantizeShape(8, 11008, "gated"),
}
# In the simulator: more tokens than blocks, a tail of groups, two tiles, no outliers and nothing but outliers.
SIMULATED = {
    "normed": QuantizeShape(19, 512, "normed", 4, 128),
    "plain": QuantizeShape(3, 1152, "plain"),
    "gated": QuantizeShape(3, 9216, "gated"),
    "gated_w4a4": QuantizeShape(2, 384, "gated", 4, 128, 0),
    "w8a8": QuantizeShape(3, 384, "normed", outliers=384),
}
