"""Activations to integers: per token, or per token and group of channels, outlier channels apart."""

from pallas_kernels.quantize.api import quantize
from pallas_kernels.quantize.inputs import Gated, Inputs, Normed, values
from pallas_kernels.quantize.rows import QuantizedRows

__all__ = ["Gated", "Inputs", "Normed", "QuantizedRows", "quantize", "values"]
