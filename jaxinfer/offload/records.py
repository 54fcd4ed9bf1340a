"""How a model's experts are held outside of the model: which record, and what of a checkpoint makes one."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxinfer.config import OffloadSettings
from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.quant.form import Quantization
from pallas_kernels.int4_matmul.matrix import unpack
from pallas_kernels.packed_experts import GROUP, Record


def expert_record(config: ModelConfig, settings: OffloadSettings, dtype: str) -> Record:
    """The record of the experts of a model that runs in `dtype`.

    Raises:
      ConfigError: the model is quantized in a way that records have no place for, or its widths do not fit them.
    """
    assert config.moe is not None
    form = config.quantization
    if form is None:
        format, group = (dtype if settings.experts == "stored" else settings.experts), GROUP
    else:
        _check_form(form, settings)
        format, group = "int4", min(form.group or GROUP, GROUP)
    try:
        return Record(config.hidden_size, config.moe.width, format, group)
    except NotImplementedError as error:
        raise ConfigError(
            f"offload.device_memory: this model's experts cannot be offloaded: {error}"
        ) from None


def _check_form(form: Quantization, settings: OffloadSettings) -> None:
    plain = form.weight_bits == 4 and form.activation_bits == 16
    plain = plain and not (form.outliers or form.reorder or form.rotate or form.two_level)
    if not plain or (form.group > GROUP and form.group % GROUP):
        raise ConfigError(
            f"offload.device_memory: this model is quantized ({form.mode}), and its experts cannot be left on the host so: "
            "that takes 4-bit weights and nothing else, as of --quant w4a16; or offload the unquantized model with "
            'offload.experts = "int4"'
        )
    if settings.experts != "stored":
        raise ConfigError(
            f"offload.experts = {settings.experts!r}: this model is quantized already ({form.mode}); "
            'expected "stored"'
        )


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of what a checkpoint holds of one expert."""
    assert config.moe is not None
    wide, width, form = config.hidden_size, config.moe.width, config.quantization
    if form is None:
        return {"gate_up": (wide, 2, width), "down": (width, wide)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, inputs, outputs in (("gate_up", wide, 2 * width), ("down", width, wide)):
        shapes[f"{name}.low"] = (outputs, inputs // 2)
        shapes[f"{name}.scale"] = (outputs // form.rows, inputs // form.group_of(inputs))
    return shapes


def pack(record: Record, leaves: Mapping[str, np.ndarray], form: Quantization | None) -> np.ndarray:
    """uint8 [record.nbytes] of an expert's `leaf_shapes`. Quantized weights keep their codes and scales."""
    if form is None:
        return record.pack(leaves["gate_up"], leaves["down"])
    gate_up, scales = _codes(leaves, "gate_up", record, form)
    gate, up = np.split(gate_up, 2, axis=1)
    gate_scales, up_scales = np.split(scales, 2, axis=1)
    return record.pack_codes((gate, gate_scales), (up, up_scales), _codes(leaves, "down", record, form))


def _codes(
    leaves: Mapping[str, np.ndarray], name: str, record: Record, form: Quantization
) -> tuple[np.ndarray, np.ndarray]:
    """int8 [K, N] and float32 scales [K / record.group, N]."""
    low, scale = leaves[f"{name}.low"], leaves[f"{name}.scale"]
    inputs = 2 * low.shape[1]
    group = form.group_of(inputs)
    codes = np.asarray(unpack(jnp.asarray(low), group))
    starts = np.arange(0, inputs, record.group) // group  # the group of each of the record's
    return np.ascontiguousarray(codes.T), np.repeat(scale, form.rows, axis=0).T[starts]
