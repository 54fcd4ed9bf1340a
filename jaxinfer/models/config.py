"""What a decoder is made of: every difference between families is a field here, never a copy of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from jaxinfer.errors import ModelError
from jaxinfer.quant.form import Quantization

MOST_LAYERS = 10_000  # of any model; a larger number is a damaged file, and would be expanded to a list


def _require(accepted: bool, name: str, value: Any, wanted: str) -> None:
    if not accepted:
        raise ModelError(f"model config: {name} = {value!r} is not accepted; it must be {wanted}")


def _sizes(config: Any, *names: str) -> None:
    for name in names:
        size = getattr(config, name)
        _require(isinstance(size, int) and 0 < size < 2**31, name, size, "a whole number from 1 to 2**31 - 1")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or (value > 0 and math.isfinite(value)), name, value, "a positive number")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      theta: base of the frequencies.
      dim: rotated channels of each head (smaller than head_dim where a family rotates a part).
      kind: how the context is stretched.
      factor: stretch (linear, dynamic, llama3, yarn, longrope).
      original_context: context length before the stretch, in tokens.
      low_freq_factor, high_freq_factor: llama3.
      beta_fast, beta_slow, truncate: yarn.
      attention_factor: scale of cos and sin (yarn, longrope); None derives it as the family does.
      mscale, mscale_all_dim: yarn.
      short_factor, long_factor: longrope, [dim // 2] each.
      short_mscale, long_mscale: Phi-3.5-MoE's own scales of cos and sin.

    Raises:
      ModelError: an impossible value, by its name.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float | None = None
    long_mscale: float | None = None

    def __post_init__(self):
        _sizes(self, "dim")
        _require(self.dim % 2 == 0, "rope.dim", self.dim, "even")
        _positive(self, "theta", "factor", "attention_factor", "short_mscale", "long_mscale")
        if self.kind in ("dynamic", "llama3", "yarn", "longrope"):
            _sizes(self, "original_context")
        if self.kind == "dynamic":
            _require(self.dim > 2, "rope.dim", self.dim, "more than 2 for dynamic rotary embedding")
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            _require(low < high, "rope.high_freq_factor", high, f"above low_freq_factor ({low})")
        if self.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                factors = getattr(self, name)
                _require(
                    len(factors) == self.dim // 2 and all(f > 0 for f in factors),
                    f"rope.{name}",
                    factors,
                    f"{self.dim // 2} positive numbers (rope.dim // 2)",
                )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts block.

    Attributes:
      experts: number of experts (E).
      experts_per_token: how many a token visits (K).
      width: hidden width of one expert (F).
      renormalize: the K chosen router probabilities are scaled to sum to 1.
      router: "softmax" (softmax over all experts, then top-K) or "sparsemixer" (Phi-3.5-MoE, top-2).
      router_jitter: sparsemixer's threshold width.

    Raises:
      ModelError: an impossible value, by its name.
    """

    experts: int
    experts_per_token: int
    width: int
    renormalize: bool = True
    router: Literal["softmax", "sparsemixer"] = "softmax"
    router_jitter: float = 0.0

    def __post_init__(self):
        _sizes(self, "experts", "experts_per_token", "width")
        chosen = self.experts_per_token
        _require(chosen <= self.experts, "experts_per_token", chosen, f"at most {self.experts} (experts)")
        if self.router == "sparsemixer":
            _require(chosen == 2, "experts_per_token", chosen, "2 for the router sparsemixer")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer.

    Attributes:
      family: Hugging Face `model_type`, for messages and metadata only; the model never branches on it.
      context_length: longest sequence, prompt and answer together, in tokens.
      windows: sliding window of each layer in tokens, 0 for full attention; [layers].
      moe_layers: which layers have experts; [layers].
      qk_norm: RMS norm of queries and keys before rotation, per head or over all heads together.
      clip_qkv: queries, keys and values are clipped to +- this.
      eos_ids: tokens that end a sequence.
      quantization: how the linear layers are stored and multiplied; None keeps them as plain arrays.

    Raises:
      ModelError: an impossible value, or values that do not fit together, by their names.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context_length: int
    rope: RopeConfig
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float | None = None
    tie_embeddings: bool = False
    windows: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    moe_layers: tuple[bool, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantization: Quantization | None = None

    def __post_init__(self):
        _sizes(self, "vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim", "mlp_width")
        _sizes(self, "context_length")
        _require(self.layers <= MOST_LAYERS, "layers", self.layers, f"at most {MOST_LAYERS}")
        heads = self.heads
        _require(heads % self.kv_heads == 0, "kv_heads", self.kv_heads, f"a divisor of heads ({heads})")
        _require(
            self.rope.dim <= self.head_dim, "rope.dim", self.rope.dim, f"at most {self.head_dim} (head_dim)"
        )
        _positive(self, "norm_eps", "clip_qkv")
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.layers)
        if not self.moe_layers:
            object.__setattr__(self, "moe_layers", (self.moe is not None,) * self.layers)
        for name in ("windows", "moe_layers"):
            each = getattr(self, name)
            _require(len(each) == self.layers, name, each, f"one for each of {self.layers} layers")
        _require(min(self.windows) >= 0, "windows", self.windows, "0 or positive")
        if any(self.moe_layers):
            _require(self.moe is not None, "moe", self.moe, "set where moe_layers has experts")
        ids = self.eos_ids
        _require(
            all(0 <= i < self.vocab_size for i in ids),
            "eos_ids",
            ids,
            f"below {self.vocab_size} (vocab_size)",
        )

    @property
    def group(self) -> int:
        """Query heads of one KV head (G)."""
        return self.heads // self.kv_heads

    @property
    def runs(self) -> tuple[tuple[bool, int], ...]:
        """Consecutive layers of one kind, (has experts, how many): each run is stacked and scanned."""
        runs: list[tuple[bool, int]] = []
        for moe in self.moe_layers:
            if runs and runs[-1][0] == moe:
                runs[-1] = (moe, runs[-1][1] + 1)
            else:
                runs.append((moe, 1))
        return tuple(runs)
