"""Weights of which every device holds its share. They take the place of the whole ones in a model that runs on a mesh, and
exchange what their neighbours need; see `scaleout.mesh`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.models.linear import run_experts
from jaxinfer.quant.qarray import QArray
from jaxinfer.split import Split
from pallas_kernels.int4_matmul import PackedMatrix
from pallas_kernels.matmul import matmul
from pallas_kernels.quantize import Inputs, QuantizedRows, values


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["inputs"])
@dataclass(frozen=True)
class SplitInputs:
    """A plain matrix [*inputs here, outputs]: every device multiplies the inputs that it has, and the products are summed."""

    array: jax.Array
    inputs: Split

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def multiply(self, x: Inputs) -> jax.Array:
        """x [T, K here] -> float32 [T, N]."""
        return self.inputs.sum(matmul(values(x), self.array.reshape(-1, self.array.shape[-1])))


@partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["inputs", "outputs"])
@dataclass(frozen=True)
class SplitOutputs:
    """A packed matrix whose inputs come in parts, and of whose outputs every device computes its share.

    Its inputs are sorted across all of them and rounded by the row, so they are brought together first. The row is then rounded as on
    one device, and the integer products are the same.
    """

    packed: QArray
    inputs: Split
    outputs: Split

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.inputs, *self.packed.outputs)

    def multiply(self, x: Inputs) -> jax.Array:
        """x [T, K here] -> float32 [T, N]."""
        return self.outputs.gather(self.packed.multiply(self.inputs.gather(values(x))))

    # What `quant.experts.expert_mlp` asks of the down matrices of experts.

    @property
    def matrix(self) -> PackedMatrix:
        return self.packed.matrix

    def shared(self) -> SplitOutputs:
        return SplitOutputs(self.packed.shared(), self.inputs, self.outputs)

    def rows(self, x: jax.Array) -> QuantizedRows:
        """Activations [T, K here] as this layer takes them."""
        return self.packed.rows(self.inputs.gather(x))


@partial(
    jax.tree_util.register_dataclass, data_fields=["gate_up"], meta_fields=["experts", "width", "outputs"]
)
@dataclass(frozen=True)
class SplitExperts:
    """gate_up [E here, D, 2, F here] of the experts that a device has, or its share of their width.

    Attributes:
      outputs: how the results of packed experts are split, see `SplitOutputs`; plain ones are sums over the width.
    """

    gate_up: jax.Array | QArray
    experts: Split
    width: Split
    outputs: Split

    def expert_mlp(
        self, x: jax.Array, down: Any, ids: jax.Array, shares: jax.Array, activation: str
    ) -> jax.Array:
        """See `linear.run_experts`; ids are those of all experts."""
        count = self.gate_up.shape[0]
        mine = self.experts.here(ids, count)
        own = jnp.where(mine, ids - self.experts.start(count), -1)
        out = run_experts(x, self.gate_up, down, own, shares, activation).astype(jnp.float32)
        out = self.experts.sum(out)
        if isinstance(self.gate_up, QArray):
            out = self.outputs.gather(out)
        else:
            out = self.width.sum(out)
        return out.astype(x.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["vocabulary"])
@dataclass(frozen=True)
class SplitTable:
    """An embedding [V here, D]."""

    array: jax.Array
    vocabulary: Split

    def rows(self, tokens: jax.Array) -> jax.Array:
        """tokens int32 [T] -> [T, D]."""
        size = self.array.shape[0]
        here = self.vocabulary.here(tokens, size)
        rows = self.array[jnp.where(here, tokens - self.vocabulary.start(size), 0)]
        return self.vocabulary.only(rows, here[:, None])


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["over"])
@dataclass(frozen=True)
class SplitScale:
    """The scale [*S here] of a norm over axes of which every device has its share."""

    array: jax.Array
    over: Split
