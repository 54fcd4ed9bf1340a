"""One program on several devices: every one holds its share of the weights and of the KV pool, and runs the same step on it.

The step is the one of a single device, under `jax.shard_map`: its model has the heads, the width, the experts and the vocabulary of one
share, so every kernel works on its own part as it is. What has to be exchanged, the weights do themselves (`models.shares`), the sampler
(`split`) and, where several devices share a KV head, the choice of pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.config import MeshShape, Settings
from jaxinfer.engine.spread import ONE_DEVICE, Place, Spread, Step
from jaxinfer.engine.step import State
from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Decoder, Layer, MoE
from jaxinfer.models.placement import Placement, Shape
from jaxinfer.models.shares import SplitExperts, SplitInputs, SplitOutputs, SplitScale, SplitTable
from jaxinfer.quant.qarray import QArray
from jaxinfer.scaleout.axes import MESH_AXES, Axes
from jaxinfer.split import HeadSplit, Split


def spread_over(config: ModelConfig, settings: Settings) -> Spread:
    """The devices that the settings ask for.

    Raises:
      ConfigError: there are not so many, they differ, or the model does not divide among them.
    """
    shape = settings.engine.mesh
    if shape is None:
        return ONE_DEVICE
    assert isinstance(shape, MeshShape)
    axes = Axes(config, shape.tensor, shape.expert)
    if settings.offload.device_memory is not None:
        raise ConfigError(
            "offload.device_memory does not go with engine.mesh: the host serves the experts of one device; accepted: "
            "either of the two (a mesh of enough devices holds all experts)"
        )
    devices = _devices(shape.tensor * shape.expert)
    return Mesh(axes, jax.sharding.Mesh(devices.reshape(shape.tensor, shape.expert), MESH_AXES))


@dataclass(frozen=True)
class Mesh(Spread):
    """A model on a mesh of devices.

    Attributes:
      axes: which part of the model each device has.
      mesh: the devices.
    """

    axes: Axes
    mesh: jax.sharding.Mesh

    @property
    def devices(self) -> Sequence[jax.Device]:
        return list(self.mesh.devices.flat)

    @property
    def heads(self) -> HeadSplit:
        return self.axes.heads

    @property
    def vocabulary(self) -> Split:
        return self.axes.split("vocabulary")

    def local(self, config: ModelConfig) -> ModelConfig:
        parts = self.heads.parts
        return replace(config, heads=config.heads // parts, kv_heads=max(1, config.kv_heads // parts))

    def share(self, name: str, shape: Shape) -> Shape:
        return tuple(axis.share for axis in self.axes.parts(name, shape))

    @property
    def place(self) -> Place:
        return self._placement

    def _placement(self, name: str, shape: Shape) -> Placement:
        axes = self.axes.parts(name, shape)
        spec = PartitionSpec(*(axis.split.names or None if axis.apart else None for axis in axes))
        joined = tuple(axis.share * (axis.split.parts if axis.apart else 1) for axis in axes)
        runs = {
            device: tuple(axis.runs[self._place(axis.split, at)] for axis in axes)
            for at, device in np.ndenumerate(self.mesh.devices)
        }
        return Placement(shape, joined, NamedSharding(self.mesh, spec), runs)

    def _place(self, split: Split, at: tuple[int, ...]) -> int:
        """Which part of a split a device has, by its place in the mesh."""
        place = 0
        for name in split.names:
            axis = MESH_AXES.index(name)
            place = place * self.mesh.devices.shape[axis] + at[axis]
        return place

    def shares(self, model: Decoder) -> Decoder:
        model = jax.tree.map(lambda leaf: leaf, model)
        if self.vocabulary.names:
            model.embed = nnx.data(SplitTable(model.embed, self.vocabulary))  # type: ignore[assignment]
        for run in model.runs:
            for layer in run if isinstance(run, nnx.List) else [run]:
                self._share_attention(layer)
                self._share_mlp(layer)
        return model

    def _share_attention(self, layer: Layer) -> None:
        attention, local = layer.attention, self.local(self.axes.config)
        attention.qkv = nnx.data(_narrowed(attention.qkv, (local.kv_heads, local.group + 2, local.head_dim)))
        attention.out = nnx.data(self._summed(attention.out, self.heads, "channels"))
        if self.axes.config.qk_norm == "full" and self.heads.names:
            for name in ("q_norm", "k_norm"):
                setattr(attention, name, nnx.data(SplitScale(getattr(attention, name), self.heads)))

    def _share_mlp(self, layer: Layer) -> None:
        mlp, config, split = layer.mlp, self.axes.config, self.axes.split
        if not isinstance(mlp, MoE):
            width = split("width")
            mlp.gate_up = nnx.data(_narrowed(mlp.gate_up, (2, config.mlp_width // width.parts)))
            mlp.down = nnx.data(self._summed(mlp.down, width, "channels"))
            return
        assert config.moe is not None
        width, outputs = split("expert_width"), split("expert_channels")
        gate_up = _narrowed(mlp.gate_up, (2, config.moe.width // width.parts))
        mlp.gate_up = nnx.data(SplitExperts(gate_up, split("experts"), width, outputs))
        if isinstance(mlp.down, QArray):
            mlp.down = nnx.data(SplitOutputs(mlp.down, width, outputs))

    def _summed(self, matrix: Any, inputs: Split, outputs: str) -> Any:
        """A matrix whose inputs, if it is plain, are split."""
        if isinstance(matrix, QArray):
            return SplitOutputs(matrix, inputs, self.axes.split(outputs))
        return SplitInputs(matrix, inputs) if inputs.names else matrix

    def layout(self, weights: Iterable[jax.Array]) -> tuple[PartitionSpec, ...]:
        shardings = [array.sharding for array in weights]
        assert all(isinstance(each, NamedSharding) and each.mesh == self.mesh for each in shardings)
        return tuple(each.spec for each in shardings if isinstance(each, NamedSharding))

    @property
    def _state(self) -> State:
        """How the state is split: all that belongs to a KV head by the heads."""
        by_head = PartitionSpec(None, None, self.heads.names or None)
        return State(pool=by_head, table=PartitionSpec(), chosen=by_head, slots=PartitionSpec())  # type: ignore[arg-type]

    def program(self, step: Step, layout: tuple[Any, ...]) -> Step:
        def run(weights: list[jax.Array], state: State, *batch: Any) -> tuple[Any, Any]:
            given = (list(layout), self._state, *(PartitionSpec() for _ in batch))
            return self._mapped(step, given, (self._state, PartitionSpec()))(weights, state, *batch)

        return run

    def new_state(self, make: Callable[[], State]) -> State:
        return jax.jit(self._mapped(make, (), self._state))()

    def _mapped(self, function: Callable, given: Any, result: Any) -> Callable:
        # Not checked: kernels are opaque to the analysis that would find what is the same everywhere.
        return jax.shard_map(function, mesh=self.mesh, in_specs=given, out_specs=result, check_vma=False)


def _narrowed(matrix: Any, outputs: Shape) -> Any:
    """A packed matrix that knows how many outputs are here."""
    return replace(matrix, outputs=outputs) if isinstance(matrix, QArray) else matrix


def _devices(count: int) -> np.ndarray:
    """The first of this process's devices."""
    devices = jax.local_devices()
    if count > len(devices):
        hint = ""
        if devices[0].platform == "cpu":
            hint = f"; a CPU stands for several with XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise ConfigError(
            f"engine.mesh: tensor * expert = {count} devices; there are {len(devices)} ({devices[0].device_kind}){hint}"
        )
    kinds = sorted({device.device_kind for device in devices[:count]})
    if len(kinds) > 1:
        raise ConfigError(
            f"engine.mesh: the first {count} devices are of different kinds, {' and '.join(kinds)}; accepted: devices of one "
            "kind (CUDA_VISIBLE_DEVICES chooses them)"
        )
    return np.array(devices[:count])
