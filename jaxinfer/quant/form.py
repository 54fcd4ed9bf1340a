"""How a model is quantized: every constant of it, stored with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from jaxinfer.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfer.models.config import ModelConfig

MODES = ("atom-w4a4", "atom-w4a8", "w8a8", "w4a16")
GROUPS = (128, 64, 32, 16)  # that are tried, largest first, where none is asked for
FEWEST_GROUPS = 8  # of the narrowest matrix, for the group size that is chosen


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What the linear layers of a model are stored and multiplied as. Atom's published values are those of atom-w4a4.

    Attributes:
      mode: what it was made from, for messages.
      weight_bits: 4, or 8: then all channels are stored as outlier channels are.
      activation_bits: 4, 8, or 16, which leaves activations as they are.
      group: input channels that share a weight scale (and, with 4-bit activations, an activation scale); 0: all of them.
      rows: output channels that share a group's scale: 2 in Atom, where a tensor core's thread holds two.
      two_level: group scales are whole numbers from 1 to 15 times one scale of the output channel, so that 4-bit code
        times group scale is an 8-bit integer and one float scale a row remains (QServe's progressive quantization).
      outliers: input channels of the largest magnitude that are kept in `outlier_bits`.
      outlier_bits: 8, or 16: not rounded at all.
      reorder: sort input channels by `statistic`, so that groups hold like channels and outliers come last.
      rotate: turn inputs by a Hadamard matrix first, which spreads outliers over all channels (QuaRot).
      smooth_keys: scale keys down and queries up, channel by channel, which 4-bit keys are better for (see `smoothing`).
      activation_clip, weight_clip: share of the largest magnitude that the scale covers; a weight_clip of 0 searches one
        for every matrix.
      method: "gptq" rounds weights one input channel after another and mends the rest; "rtn" rounds to nearest.
      damping: share of the mean diagonal that GPTQ adds to the Hessian.
      statistic: of input channels, for their order: "squares" sums squares, "mean" takes the mean magnitude.
      samples, length, seed: windows of calibration text, tokens of each, and the seed that draws them.

    Raises:
      ConfigError: an impossible value, or values that do not fit together.
    """

    mode: Literal["atom-w4a4", "atom-w4a8", "w8a8", "w4a16"]
    weight_bits: int = 4
    activation_bits: int = 4
    group: int = 128
    rows: int = 2
    two_level: bool = False
    outliers: int = 128
    outlier_bits: int = 8
    reorder: bool = True
    rotate: bool = False
    smooth_keys: bool = False
    activation_clip: float = 0.9
    weight_clip: float = 0.85
    method: Literal["rtn", "gptq"] = "gptq"
    damping: float = 0.01
    statistic: Literal["squares", "mean"] = "squares"
    samples: int = 128
    length: int = 2048
    seed: int = 0

    def __post_init__(self):
        _require(self.weight_bits in (4, 8), "weight_bits", self.weight_bits, "4 or 8")
        _require(self.activation_bits in (4, 8, 16), "activation_bits", self.activation_bits, "4, 8 or 16")
        _require(self.outlier_bits in (8, 16), "outlier_bits", self.outlier_bits, "8 or 16")
        _require(self.rows in (1, 2), "rows", self.rows, "1 or 2")
        _require(self.group >= 0 and self.group % 16 == 0, "group", self.group, "0 or a multiple of 16")
        _require(
            self.outliers >= 0 and self.outliers % 16 == 0, "outliers", self.outliers, "a multiple of 16"
        )
        for name in ("activation_clip", "weight_clip"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        _require(self.activation_clip > 0, "activation_clip", self.activation_clip, "above 0")
        _require(
            0 < self.damping < 1 and math.isfinite(self.damping),
            "damping",
            self.damping,
            "between 0 and 1",
        )
        _require(not (self.rotate and self.reorder), "reorder", True, "false where inputs are rotated")
        for name in ("samples", "length"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        if self.two_level:
            ways = self.weight_bits == 4 and self.rows == 1 and self.group > 0 and self.activation_bits == 8
            wanted = "false unless weights have 4 bits, activations 8, rows is 1 and group is not 0"
            _require(ways, "two_level", True, wanted)
        if self.weight_bits == 8:
            _require(self.outliers == 0, "outliers", self.outliers, "0 where all weights have 8 bits")

    @property
    def needs_text(self) -> bool:
        """Whether finding the weights takes inputs from real text."""
        return self.method == "gptq" or self.reorder or self.weight_clip == 0 or self.smooth_keys

    def kept(self, inputs: int) -> int:
        """Channels of the low part of a matrix with so many input channels."""
        return 0 if self.weight_bits == 8 else inputs - self.outliers

    def group_of(self, inputs: int) -> int:
        """Channels of a group of such a matrix."""
        return self.group or self.kept(inputs)

    def check(self, name: str, inputs: int, outputs: int) -> None:
        """Raises ConfigError, naming the matrix, where it cannot be stored this way."""
        if self.rotate and (inputs & -inputs) < 16:
            raise ConfigError(
                f"quantization.rotate: {name} has {inputs} input channels; it needs a multiple of 16"
            )
        if self.weight_bits == 8:
            return
        kept = inputs - self.outliers
        if kept <= 0:
            raise ConfigError(
                f"quantization.outliers = {self.outliers}: {name} has {inputs} input channels; "
                f"fewer outliers than that are needed"
            )
        group = self.group or kept
        if kept % group or group % 16:
            raise ConfigError(
                f"quantization.group = {self.group}: {name} has {inputs} input channels, {kept} without its "
                f"{self.outliers} outliers; accepted: a multiple of 16 that divides {kept}"
            )
        if outputs % self.rows:
            raise ConfigError(f"quantization.rows = {self.rows}: {name} has {outputs} output channels")


_MODES: Mapping[str, Mapping[str, Any]] = {
    "atom-w4a4": {},
    "atom-w4a8": {
        "activation_bits": 8,
        "rows": 1,
        "two_level": True,
        "smooth_keys": True,
        "activation_clip": 1.0,
        "weight_clip": 0.0,
    },
    "w8a8": {
        "weight_bits": 8,
        "activation_bits": 8,
        "group": 0,
        "rows": 1,
        "outliers": 0,
        "reorder": False,
        "activation_clip": 1.0,
        "weight_clip": 1.0,
        "method": "rtn",
    },
    "w4a16": {
        "activation_bits": 16,
        "rows": 1,
        "smooth_keys": True,
        "outliers": 0,
        "reorder": False,
        "activation_clip": 1.0,
        "weight_clip": 0.0,
    },
}
_ROTATED = {"outliers": 0, "reorder": False}


def quantization(mode: str, config: ModelConfig, **chosen: Any) -> Quantization:
    """The mode's constants with `chosen` ones (None: the mode's own) in their place, fitted to the model.

    Group size and outliers that nobody chose are 128, or for narrow models the largest of 64, 32 and 16 that leaves
    the narrowest matrix eight groups. The published weight clip is for groups of 128, whose largest weight sticks out
    further; for smaller ones it is searched.

    Raises:
      ConfigError: an unknown mode or impossible value, or a matrix of the model that does not fit, by its name.
    """
    if mode not in _MODES:
        raise ConfigError(f"quantization {mode!r} is not known; accepted: {', '.join(MODES)}")
    chosen = {name: value for name, value in chosen.items() if value is not None}
    values = dict(_MODES[mode]) | (_ROTATED if chosen.get("rotate") else {}) | chosen
    size = _fitting_group(config)
    fitting = {"group": size, "outliers": max(size, values.get("group", 0))}
    if 0 < values.get("group", size) < GROUPS[0]:
        fitting["weight_clip"] = 0.0
    form = Quantization(mode=cast(Any, mode), **(fitting | values))
    for name, (inputs, outputs) in matrices(config).items():
        form.check(name, inputs, outputs)
    return form


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Input and output channels of the linear layers that are quantized, by name."""
    wide, heads = config.hidden_size, config.heads * config.head_dim
    sizes = {
        "attention.qkv": (wide, (config.heads + 2 * config.kv_heads) * config.head_dim),
        "attention.out": (heads, wide),
    }
    widths = [config.moe.width] if config.moe and any(config.moe_layers) else []
    widths += [config.mlp_width] if not all(config.moe_layers) else []
    for width in widths:
        sizes |= {
            f"mlp.gate_up of width {width}": (wide, 2 * width),
            f"mlp.down of width {width}": (width, wide),
        }
    return sizes


def _fitting_group(config: ModelConfig) -> int:
    widths = [inputs for inputs, _ in matrices(config).values()]
    fits = (g for g in GROUPS if min(widths) >= FEWEST_GROUPS * g or g == GROUPS[-1])
    return next((g for g in fits if not any(width % g for width in widths)), GROUPS[-1])


def _require(accepted: bool, name: str, value: Any, wanted: str) -> None:
    if not accepted:
        raise ConfigError(f"quantization.{name} = {value!r} is not accepted; it must be {wanted}")
