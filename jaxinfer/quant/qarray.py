"""Packed weights that take the place of a plain array in a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.quant.experts import expert_mlp
from jaxinfer.quant.form import Quantization
from jaxinfer.quant.rotation import rotate
from pallas_kernels.int4_matmul import PackedMatrix, int4_matmul
from pallas_kernels.quantize import Inputs, QuantizedRows, quantize, values

Shape = tuple[int, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["low", "scale", "channel", "high", "high_scale", "order"],
    meta_fields=["inputs", "outputs", "form"],
)
@dataclass(frozen=True)
class QArray:
    """The weights of one linear layer, [*lead, *inputs, *outputs], packed; K and N are the products of inputs and outputs.

    Attributes:
      low, scale, channel, high, high_scale: as in `pallas_kernels.int4_matmul.PackedMatrix`, with the leading axes.
      order: int32 [*lead, K]: input channels as the packed matrix takes them; None where they come in that order.
      inputs, outputs: axes that are contracted, and those of the result.
      form: how it was quantized.
    """

    low: jax.Array | None
    scale: jax.Array | None
    channel: jax.Array | None
    high: jax.Array | None
    high_scale: jax.Array | None
    order: jax.Array | None
    inputs: Shape = field(metadata={"static": True})
    outputs: Shape = field(metadata={"static": True})
    form: Quantization = field(metadata={"static": True})

    @property
    def shape(self) -> Shape:
        """Of the weights that it stands for."""
        part = self.high if self.low is None else self.low
        assert part is not None
        return (*part.shape[:-2], *self.inputs, *self.outputs)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Weights that it stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def matrix(self) -> PackedMatrix:
        return PackedMatrix(self.low, self.scale, self.channel, self.high, self.high_scale)

    def rows(self, x: Inputs) -> QuantizedRows:
        """Activations [T, K] as this layer takes them."""
        return quantize_rows(x, self.order, self.form)

    def multiply(self, x: Inputs) -> jax.Array:
        """x @ weights. x [T, K] -> float32 [T, N]."""
        return int4_matmul(self.rows(x), self.matrix)

    def shared(self) -> QArray:
        """The first of several matrices, for what they have in common: order and form."""
        return replace(self, order=None if self.order is None else self.order[0])

    def expert_mlp(
        self, x: jax.Array, down: QArray, ids: jax.Array, shares: jax.Array, activation: str
    ) -> jax.Array:
        """See `experts.expert_mlp`; self is the experts' gate_up."""
        return expert_mlp(x, self, down, ids, shares, activation)


def quantize_rows(x: Inputs, order: jax.Array | None, form: Quantization) -> QuantizedRows:
    """Activations as a quantized layer takes them: turned, in order, rounded. x [T, K]."""
    if form.rotate:
        x = rotate(values(x))
    all_high, bits = form.weight_bits == 8, form.activation_bits
    return quantize(
        x,
        order,
        bits=bits,
        group=form.group if bits == 4 else 0,
        clip=form.activation_clip,
        outliers=x.shape[1] if all_high else form.outliers,
        outlier_bits=bits if all_high else 16 if bits == 16 else form.outlier_bits,
    )


def make_qarray(
    make: Any, lead: Shape, inputs: Shape, outputs: Shape, form: Quantization, sorts: bool
) -> QArray:
    """A QArray of the right shapes and types.

    Args:
      make: make(name, shape, dtype) gives each array.
      sorts: whether it has an order of its own. (That of a down projection is folded into the matrices before it.)
    """
    ins, outs = math.prod(inputs), math.prod(outputs)
    kept = form.kept(ins)
    groups = kept // form.group_of(ins) if kept else 0
    high = ins - kept
    scale_type = jnp.uint8 if form.two_level else jnp.float32
    wide = form.outlier_bits == 16 and form.weight_bits == 4
    return QArray(
        low=make("low", (*lead, outs, kept // 2), jnp.uint8) if kept else None,
        scale=make("scale", (*lead, outs // form.rows, groups), scale_type) if kept else None,
        channel=make("channel", (*lead, outs), jnp.float32) if form.two_level else None,
        high=make("high", (*lead, outs, high), jnp.float16 if wide else jnp.int8) if high else None,
        high_scale=make("high_scale", (*lead, outs), jnp.float32) if high and not wide else None,
        order=make("order", (*lead, ins), jnp.int32) if form.reorder and sorts else None,
        inputs=inputs,
        outputs=outputs,
        form=form,
    )


def random_qarray(
    key: jax.Array, lead: Shape, inputs: Shape, outputs: Shape, form: Quantization, sorts: bool
) -> QArray:
    """Random codes whose scales give a standard deviation of about 0.02; channels in their own order."""
    deviation = {"scale": 0.02 / 4.6, "high_scale": 0.02 / 74}
    fine = 8  # a group scale in the middle of 1 to 15

    def make(name: str, shape: Shape, dtype: Any) -> jax.Array:
        if name == "order":
            return jnp.broadcast_to(jnp.arange(shape[-1], dtype=dtype), shape)
        if name == "channel":
            return jnp.full(shape, 0.02 / 4.6 / fine, dtype)
        if name == "scale" and form.two_level:
            return jnp.full(shape, fine, dtype)
        if name in deviation:
            return jnp.full(shape, deviation[name], dtype)
        if name == "high" and dtype == jnp.float16:
            return 0.02 * jax.random.normal(key, shape, dtype)
        return jax.random.bits(jax.random.fold_in(key, len(name)), shape, jnp.uint8).astype(dtype)

    return make_qarray(make, lead, inputs, outputs, form, sorts)
