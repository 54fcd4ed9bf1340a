"""Which part of which parameter a device of a mesh holds: one table from parameters to logical axes, one from those to mesh axes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.placement import Runs, Shape
from jaxinfer.split import WHOLE, HeadSplit, Split

MESH_AXES = ("tensor", "expert")

SPLIT_OVER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "vocabulary": MESH_AXES,
        "heads": MESH_AXES,
        "kv_heads": MESH_AXES,
        "width": MESH_AXES,
        "channels": MESH_AXES,
        "experts": ("expert",),
        "expert_width": ("tensor",),
        "expert_channels": ("tensor",),
    }
)
"""The mesh axes that a logical axis is split over; of one that is not here every device has all. Attention, vocabulary and plain MLPs
go over all devices, so that the axis of the experts does not leave them, and the keys, on every device; each expert's width goes over
the axis that the experts do not."""

PARAMETERS: Mapping[str, str] = MappingProxyType(
    {
        "embed": "vocabulary hidden",
        "head": "hidden vocabulary",
        "head_bias": "vocabulary",
        "attention.qkv": "hidden -> kv_heads slots head_dim",
        "attention.qkv_bias": "kv_heads slots head_dim",
        "attention.out": "heads head_dim -> hidden",
        "attention.q_norm": "heads head_dim",
        "attention.k_norm": "kv_heads head_dim",
        "mlp.gate_up": "hidden -> pair width",
        "mlp.gate_up_bias": "pair width",
        "mlp.down": "width -> hidden",
        "moe.gate_up": "experts: hidden -> pair expert_width",
        "moe.down": "experts: expert_width -> hidden",
    }
)
"""Logical axes of the parameters of `abstract(config)` that may be split, by their paths in a layer or in the model: "leading axes:
inputs -> outputs" of a matrix. The other norms, routers, and biases that follow a sum are whole everywhere, and so are norms of each head
by itself."""

PACKED_OUTPUTS: Mapping[str, str] = MappingProxyType(
    {"attention.out": "channels", "mlp.down": "channels", "moe.down": "expert_channels"}
)
"""Matrices that are split by their inputs, and what their outputs are called where they are packed. The inputs of packed ones are
sorted across all devices and rounded by the row, so each device takes whole rows and computes a share of the outputs."""

_PATH = re.compile(
    r"(runs\.(?P<run>\d+)\.(?P<layer>\d+\.)?)?(?P<name>.+?)(\.(?P<array>low|scale|channel|high|high_scale|order))?"
)


class Parts(NamedTuple):
    """One axis of an array: how it is split, and the runs of it that each part holds, all as many elements.

    apart: the parts lie side by side in the array of all devices; else it is as long as one part, because another axis is split
      along with this one.
    """

    split: Split
    runs: tuple[Runs, ...]
    apart: bool = True

    @property
    def share(self) -> int:
        """Elements of a part."""
        return sum(stop - start for start, stop in self.runs[0])


@dataclass(frozen=True)
class Axes:
    """The logical axes of a model on a mesh.

    Attributes:
      config: of the whole model.
      tensor, expert: devices along the axes of the mesh.

    Raises:
      ConfigError: a mesh that does not divide the heads or the experts.
    """

    config: ModelConfig
    tensor: int
    expert: int

    def __post_init__(self):
        self._check_heads()
        self._check_experts()

    @cached_property
    def heads(self) -> HeadSplit:
        """The query heads go over all devices if those divide them, else over "tensor". KV heads that are fewer are held by several."""
        names = MESH_AXES if self._divides(self._devices(MESH_AXES)) else MESH_AXES[:1]
        parts = self._devices(names)
        return HeadSplit(self._real(names), parts, max(1, parts // self.config.kv_heads))

    def _divides(self, parts: int) -> bool:
        """Whether so many devices can each have as many query heads, and all of a KV head that these read."""
        heads, kv_heads = self.config.heads, self.config.kv_heads
        return heads % parts == 0 and (kv_heads % parts == 0 or parts % kv_heads == 0)

    def _check_heads(self) -> None:
        if not self._divides(self.tensor):
            heads, kv_heads = self.config.heads, self.config.kv_heads
            accepted = [n for n in range(1, heads + 1) if self._divides(n)]
            raise ConfigError(
                f"engine.mesh: tensor = {self.tensor} does not divide the model's {heads} query heads on {kv_heads} KV "
                f"heads; accepted: {_listed(accepted)}"
            )

    def _check_experts(self) -> None:
        if self.expert == 1:
            return
        moe = self.config.moe
        if moe is None or not any(self.config.moe_layers):
            raise ConfigError(f"engine.mesh: expert = {self.expert}: the model has no experts; accepted: 1")
        if moe.experts % self.expert:
            problem = "is more than" if self.expert > moe.experts else "does not divide"
            accepted = [n for n in range(1, moe.experts + 1) if moe.experts % n == 0]
            raise ConfigError(
                f"engine.mesh: expert = {self.expert} {problem} the model's {moe.experts} experts; "
                f"accepted: {_listed(accepted)}"
            )

    def split(self, axis: str) -> Split:
        """How a logical axis is split: over the mesh axes of the table, over the first of them if it does not divide among
        all, else not at all."""
        if axis in ("heads", "kv_heads"):
            return self.heads
        names = SPLIT_OVER.get(axis, ())
        form = self.config.quantization
        # Rows of a packed matrix that share their scales stay together.
        grain = 1 if form is None or axis in ("vocabulary", "experts") else form.rows
        while names and self._sizes[axis] % (self._devices(names) * grain):
            names = names[:-1]
        return Split(self._real(names), self._devices(names))

    def parts(self, path: str, shape: Shape) -> list[Parts]:
        """Of every axis of a parameter of this path and shape."""
        parsed = _PATH.fullmatch(path)
        assert parsed is not None, path
        name, run = parsed["name"], parsed["run"]
        if run is not None and self.config.runs[int(run)][0]:
            name = name.replace("mlp.", "moe.", 1)
        if name not in PARAMETERS or (name.endswith("_norm") and self.config.qk_norm == "head"):
            return [_whole(size) for size in shape]
        lead, inputs, outputs = _axes(PARAMETERS[name])
        layers = ("layers",) if run is not None and parsed["layer"] is None else ()
        if parsed["array"] is None:
            axes = (*layers, *lead, *inputs, *outputs)
            return [self._cut(axis, size) for axis, size in zip(axes, shape, strict=True)]
        front = [self._cut(axis, size) for axis, size in zip((*layers, *lead), shape)]
        rest = [_whole(size) for size in shape[len(front) :]]
        if parsed["array"] != "order":
            renamed = (PACKED_OUTPUTS[name],) if name in PACKED_OUTPUTS else outputs
            rest[0] = self._rows(renamed, rest[0].share)
        return [*front, *rest]

    def _cut(self, axis: str, size: int) -> Parts:
        if (
            axis == "slots"
        ):  # of a KV head: its query heads, its key, its value; those who share it share the first
            group, copies = self.config.group, self.heads.copies
            own = group // copies
            if copies == 1:
                return _whole(size)
            of_copy = [((c * own, (c + 1) * own), (group, group + 2)) for c in range(copies)]
            return Parts(self.heads, tuple(of_copy) * self.config.kv_heads, apart=False)
        split = self.split(axis)
        copies = self.heads.copies if axis == "kv_heads" else 1
        each = size * copies // split.parts
        return Parts(
            split, tuple(((p // copies * each, (p // copies + 1) * each),) for p in range(split.parts))
        )

    def _rows(self, outputs: tuple[str, ...], rows: int) -> Parts:
        """Of a packed matrix with these output axes, whose rows are all their combinations; or of what some rows share."""
        sizes = [self._sizes[axis] for axis in outputs]
        every = np.arange(math.prod(sizes)).reshape(sizes)
        cuts = [self._cut(axis, size) for axis, size in zip(outputs, sizes)]
        split = next((cut.split for cut in cuts if cut.split.parts > 1), WHOLE)
        together = every.size // rows
        runs = []
        for place in range(split.parts):
            picked = [_indices(cut.runs[place % len(cut.runs)]) for cut in cuts]
            mine = every[np.ix_(*picked)].reshape(-1, together)
            assert np.array_equal(mine, mine[:, :1] + np.arange(together)), "rows with one scale are apart"
            runs.append(_runs(mine[:, 0] // together))
        return Parts(split, tuple(runs))

    @cached_property
    def _sizes(self) -> dict[str, int]:
        config, moe = self.config, self.config.moe
        return {
            "vocabulary": config.vocab_size,
            "kv_heads": config.kv_heads,
            "slots": config.group + 2,
            "head_dim": config.head_dim,
            "pair": 2,
            "width": config.mlp_width,
            "channels": config.hidden_size,
            "experts": moe.experts if moe else 1,
            "expert_width": moe.width if moe else 1,
            "expert_channels": config.hidden_size,
        }

    def _devices(self, names: tuple[str, ...]) -> int:
        return math.prod(getattr(self, name) for name in names)

    def _real(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those with more than one device."""
        return tuple(name for name in names if getattr(self, name) > 1)


def _axes(text: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Leading axes, inputs and outputs of an entry of PARAMETERS; what is no matrix has outputs alone."""
    lead, _, rest = text.rpartition(":")
    inputs, _, outputs = rest.rpartition("->")
    return tuple(lead.split()), tuple(inputs.split()), tuple(outputs.split())


def _whole(size: int) -> Parts:
    return Parts(WHOLE, (((0, size),),))


def _indices(runs: Runs) -> np.ndarray:
    return np.concatenate([np.arange(start, stop) for start, stop in runs])


def _runs(indices: np.ndarray) -> Runs:
    """The stretches of consecutive numbers."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(indices, breaks))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
