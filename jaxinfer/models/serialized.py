"""A ModelConfig as JSON and back, for jaxinfer.json."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxinfer.errors import ConfigError, ModelError
from jaxinfer.models.config import ModelConfig
from jaxinfer.quant.form import Quantization


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Plain dictionaries, lists, numbers and strings; the quantization, which is no part of the model itself, is left out."""
    values = dataclasses.asdict(config)
    del values["quantization"]
    return _plain(values)


def form_to_json(form: Quantization | None) -> dict[str, Any] | None:
    """A quantization likewise."""
    return None if form is None else dataclasses.asdict(form)


def form_from_json(values: Mapping[str, Any] | None) -> Quantization | None:
    """The reverse of `form_to_json`.

    Raises:
      ModelError: as `from_json`.
    """
    try:
        return None if values is None else _read(Quantization, values, "jaxinfer.json: quantization")
    except ConfigError as error:
        raise ModelError(f"jaxinfer.json: {error}") from error


def from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The reverse of `to_json`.

    Raises:
      ModelError: a field that is unknown, missing, of the wrong type or impossible.
    """
    return _read(ModelConfig, values, "jaxinfer.json: model")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`; these are all that the config's fields use."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), value, where)
    if origin is types.UnionType:
        return None if value is None else _read(arguments[0], value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ModelError(f"{where} is {value!r}; accepted: {', '.join(arguments)}")
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind:
        return value
    name = kind.__name__ if origin is None else "list"
    raise ModelError(f"{where} is {value!r}; accepted: a value of type {name}")


def _read_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ModelError(f"{where} is {value!r}; accepted: an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in fields:
            raise ModelError(f"{where}: {name} is not known; accepted: {', '.join(fields)}")
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING:
            raise ModelError(f"{where}: {name} is missing")
    return kind(**{name: _read(hints[name], item, f"{where}.{name}") for name, item in value.items()})
