"""Decoder layers between the pieces of storage and the model's modules."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from convert.reader import SourceFolder
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import abstract, unstack
from jaxinfer.models.layers import Layer
from jaxinfer.models.manifest import Piece
from jaxinfer.models.tensor_spec import Shape, TensorSpec

_OF_EXPERTS = ("mlp.gate_up", "mlp.down")


def described(config: ModelConfig) -> list[Layer]:
    """Shapes and types of every layer's arrays, one layer after another."""
    shapes = abstract(config)
    single = jax.eval_shape(lambda tree: unstack(tree, config), shapes)
    return [layer for run in single.runs for layer in run]


def read_layer(
    index: int,
    like: Layer,
    folder: SourceFolder,
    specs: tuple[TensorSpec, ...],
    shapes: dict[str, Shape],
    has_experts: bool,
) -> Layer:
    """One plain layer of a checkpoint as float32 arrays."""
    prefix = f"layers.{index}."
    storage: dict[str, np.ndarray] = {}
    for spec in specs:
        if spec.target.startswith(prefix):
            array = storage.setdefault(spec.target, np.empty(shapes[spec.target], np.float32))
            spec.place(folder.view(spec.name), array)
    folder.release()

    def array_of(path, leaf):
        name = _name(path)
        if has_experts and name in _OF_EXPERTS:
            own = name.removeprefix("mlp.")
            return np.stack([storage[f"{prefix}moe.experts.{e}.{own}"] for e in range(leaf.shape[0])])
        return storage[prefix + name]

    return jax.tree_util.tree_map_with_path(array_of, like)


def named(layer: Layer) -> dict[str, np.ndarray]:
    """The arrays of a layer by their paths in it."""
    return {_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(layer)}


def from_named(arrays: dict[str, np.ndarray], like: Layer) -> Layer:
    """The reverse of `named`, in the structure of `like`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: arrays[_name(path)], like)


def layer_pieces(
    index: int, layer: Layer, has_experts: bool, size: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """A layer's arrays as pieces of storage of at most `size` bytes, every one with its type."""
    for name, array in named(layer).items():
        if has_experts and name.startswith(_OF_EXPERTS):
            own = name.removeprefix("mlp.")
            parts = {f"layers.{index}.moe.experts.{e}.{own}": part for e, part in enumerate(array)}
        else:
            parts = {f"layers.{index}.{name}": array}
        for target, part in parts.items():
            rows = max(1, size // max(1, part[:1].nbytes))
            for begin in range(0, len(part), rows):
                block = np.ascontiguousarray(part[begin : begin + rows])
                start = (begin, *(0,) * (part.ndim - 1))
                yield Piece(target, start, block.shape, block.dtype.name), block


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
