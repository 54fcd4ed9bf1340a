"""A whole model at once, where it is in memory already."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import abstract, unstack
from jaxinfer.models.layers import Decoder
from jaxinfer.quant.calibrate import LayerReport, quantize_layers
from jaxinfer.quant.form import Quantization


def quantize_model(
    model: Decoder, config: ModelConfig, form: Quantization, windows: np.ndarray
) -> tuple[ModelConfig, Decoder, list[LayerReport]]:
    """The quantized model, unstacked, with its config. model: unstacked too; windows int32 [n, T]."""
    plain = [layer for run in model.runs for layer in run]
    layers, reports = [], []
    for layer, report in quantize_layers(config, form, np.asarray(model.embed, np.float32), plain, windows):
        layers.append(layer)
        reports.append(report)
    quantized = jax.tree.map(lambda leaf: leaf, model)
    ends = np.cumsum([count for _, count in config.runs])
    runs = [layers[end - count : end] for end, (_, count) in zip(ends, config.runs)]
    quantized.runs = nnx.List([nnx.List(run) for run in runs])
    config = replace(config, quantization=form)
    shapes = abstract(config)
    single = jax.eval_shape(lambda tree: unstack(tree, config), shapes)
    return config, jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), quantized, single), reports
