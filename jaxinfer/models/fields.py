"""Typed reading of a configuration dictionary: every complaint names the key, the value and what is accepted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard, TypeVar

from jaxinfer.errors import ModelError

_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = 3.4e38

_Chosen = TypeVar("_Chosen")


class Fields:
    """A JSON object of config.json. A key that is absent gives the default; where there is none, it is required.

    Args:
      values: the object.
      where: its name in messages, such as "config.json".
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise ModelError(f"{where} is {_short(values)}; accepted: a JSON object")
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse(self, key: str, accepted: str) -> NoReturn:
        value = _short(self.values[key]) if key in self.values else "missing"
        raise ModelError(f"{self.where}: {key} is {value}; accepted: {accepted}")

    def whole(self, key: str, default: int | None = None, *, low: int = 1, high: int = _INT32_MAX) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(key, f"a whole number between {low} and {high}")
        return value

    def real(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self._get(key, default)
        if not _is_number(value) or value <= above:
            self.refuse(key, f"a number above {above:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def choice(self, key: str, options: Mapping[str, _Chosen], default: str | None = None) -> _Chosen:
        value = self._get(key, default)
        if not isinstance(value, str) or value not in options:
            self.refuse(key, ", ".join(options))
        return options[value]

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        value = self.values.get(key)
        items = list(value) if _is_list(value) else []
        if len(items) != length or not all(_is_number(item) and item > 0 for item in items):
            self.refuse(key, f"a list of {length} positive numbers")
        return tuple(float(item) for item in items)

    def wholes(self, key: str) -> tuple[int, ...]:
        """One whole number or a list of them; nothing if absent."""
        value = self.values.get(key)
        items = [] if value is None else [*value] if _is_list(value) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            self.refuse(key, "a whole number, a list of them, or null")
        return tuple(items)

    def inner(self, key: str) -> Fields:
        return Fields(self.values[key], f"{self.where}: {key}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            self.refuse(key, "a value; this key is required")
        return default if value is None else value


def first_present(fields: Fields, keys: Iterable[str]) -> str:
    """The first of several spellings of one key that is there, or the first spelling."""
    spellings = list(keys)
    return next((key for key in spellings if key in fields), spellings[0])


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < _FLOAT32_MAX  # not for nan, nor infinities


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
