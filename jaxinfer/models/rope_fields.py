"""Reads the rotary part of a config.json, in its old form (rope_theta, rope_scaling) and its new one (rope_parameters)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxinfer.models.config import RopeConfig
from jaxinfer.models.fields import Fields, first_present

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ALL_KINDS: dict[str, Kind] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}
# Phi-3's first releases called its long factors "su", then "yarn".
PHI3_KINDS: dict[str, Kind] = {
    "default": "default",
    "longrope": "longrope",
    "su": "longrope",
    "yarn": "longrope",
}
PHIMOE_KINDS: dict[str, Kind] = {"default": "default", "longrope": "longrope"}


@dataclass(frozen=True, kw_only=True)
class RopeFamily:
    """How a family reads its rotary settings.

    Attributes:
      kinds: accepted names of rope_type, and what each means.
      theta: default base.
      partial: heads may be rotated in part.
      original_context: default of the top-level original_max_position_embeddings; it goes before the one in rope_scaling.
      mscales: cos and sin have their own scale below and beyond the original context.
    """

    kinds: dict[str, Kind] | None = None
    theta: float = 10000.0
    partial: bool = False
    original_context: int | None = None
    mscales: bool = False


PLAIN_ROPE = RopeFamily()


def read_rope(config: Fields, family: RopeFamily, head_dim: int, context: int) -> tuple[RopeConfig, int]:
    """The rotary settings, and the longest context that they reach (`context` is max_position_embeddings)."""
    key = first_present(config, ("rope_scaling", "rope_parameters"))
    rope = config.inner(key) if key in config else Fields({}, f"{config.where}: {key}")
    for name, value in rope.values.items():
        if isinstance(value, dict):
            rope.refuse(name, "one set of rotary settings for all layers")
    kind = rope.choice(first_present(rope, ("rope_type", "type")), family.kinds or ALL_KINDS, "default")
    theta = (rope if "rope_theta" in rope else config).real("rope_theta", family.theta)
    dim = _rotated(config, rope, family, head_dim)
    if kind == "default":
        return RopeConfig(theta=theta, dim=dim), context
    if kind == "linear":
        factor = rope.real("factor")
        return RopeConfig(theta=theta, dim=dim, kind=kind, factor=factor), _reach(context * factor)
    if kind == "dynamic":
        if dim == 2:
            config.refuse("head_dim", "more than 2 rotated channels, for dynamic rotary embedding")
        factor = rope.real("factor")
        return (
            RopeConfig(theta=theta, dim=dim, kind=kind, factor=factor, original_context=context),
            _reach(context * factor),
        )
    original = _original_context(config, rope, family, context)
    if kind == "llama3":
        return _llama3(rope, theta, dim, original), context
    if kind == "yarn":
        read = _yarn(rope, theta, dim, original, context)
        return read, max(context, _reach(original * read.factor))
    return _longrope(rope, family, theta, dim, original, context), context


def _rotated(config: Fields, rope: Fields, family: RopeFamily, head_dim: int) -> int:
    holder = rope if "partial_rotary_factor" in rope else config
    part = holder.real("partial_rotary_factor", 1.0)
    if part > 1 or (part != 1 and not family.partial):
        holder.refuse("partial_rotary_factor", "a number in (0, 1]" if family.partial else "1.0")
    dim = int(head_dim * part)
    if dim < 2 or dim % 2:
        key = "partial_rotary_factor" if part != 1 else "head_dim"
        (holder if part != 1 else config).refuse(key, f"an even number of rotated channels, not {dim}")
    return dim


def _original_context(config: Fields, rope: Fields, family: RopeFamily, context: int) -> int:
    key = "original_max_position_embeddings"
    if key in config or family.original_context is not None:
        return config.whole(key, family.original_context)
    return rope.whole(key, context)


def _llama3(rope: Fields, theta: float, dim: int, original: int) -> RopeConfig:
    low, high = rope.real("low_freq_factor"), rope.real("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"a number above low_freq_factor ({low:g})")
    return RopeConfig(
        theta=theta,
        dim=dim,
        kind="llama3",
        factor=rope.real("factor"),
        original_context=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: Fields, theta: float, dim: int, original: int, context: int) -> RopeConfig:
    return RopeConfig(
        theta=theta,
        dim=dim,
        kind="yarn",
        factor=rope.real("factor", context / original),
        original_context=original,
        beta_fast=rope.real("beta_fast", 32.0),
        beta_slow=rope.real("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=_optional(rope, "attention_factor"),
        mscale=_optional(rope, "mscale"),
        mscale_all_dim=_optional(rope, "mscale_all_dim"),
    )


def _longrope(
    rope: Fields, family: RopeFamily, theta: float, dim: int, original: int, context: int
) -> RopeConfig:
    short, long = rope.numbers("short_factor", dim // 2), rope.numbers("long_factor", dim // 2)
    return RopeConfig(
        theta=theta,
        dim=dim,
        kind="longrope",
        factor=rope.real("factor", context / original),
        original_context=original,
        attention_factor=_optional(rope, "attention_factor"),
        short_factor=short,
        # transformers rotates Phi-3.5-MoE by its short factors at every length, and changes only the scale.
        long_factor=short if family.mscales else long,
        short_mscale=rope.real("short_mscale") if family.mscales else None,
        long_mscale=rope.real("long_mscale") if family.mscales else None,
    )


def _optional(rope: Fields, key: str) -> float | None:
    return rope.real(key) if key in rope else None


def _reach(tokens: float) -> int:
    return int(min(tokens, 2**31 - 1))
