"""What a setting accepts, declared on its field and checked wherever the value comes from."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxinfer.errors import ConfigError

_UNITS = {
    "": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a table",
}


def setting(default: Any, *, low=None, high=None, choices=(), answers=False, check=None) -> Any:
    """A field with its limits. `answers`: the generated tokens depend on it, so a resumed run must have the same."""
    metadata = {"low": low, "high": high, "choices": choices, "answers": answers, "check": check}
    return dataclasses.field(default=default, metadata=metadata)


def parse_memory(value: float | str) -> float | int:
    """A share of the memory in (0, 1] as float, or bytes as int: 0.9, 8589934592, "8GiB", "500 MB".

    Raises:
      ValueError: anything else.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if not match or match[2].lower() not in _UNITS:
            raise ValueError(value)
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    elif type(value) is int and value == 1:
        return 1.0  # all of it; nobody means one byte
    if isinstance(value, float) and 0 < value <= 1:
        return value
    if isinstance(value, int) and value >= 2**16:
        return value
    raise ValueError(value)


def memory_problem(value: float | str) -> str | None:
    try:
        parse_memory(value)
    except ValueError:
        return 'a share in (0, 1] or a size such as 8589934592 or "8GiB"'
    return None


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections: checks every field against its type and metadata.

    Raises:
      ConfigError: naming section, key, value and what is accepted.
    """

    section: ClassVar[str]

    def __post_init__(self):
        for item in dataclasses.fields(self):
            self.check(item.name, getattr(self, item.name))

    @classmethod
    def check(cls, key: str, value: Any) -> None:
        """Raises ConfigError if this section has no such key or the key cannot hold this value."""
        _check(cls, key, value)


def _check(kind: type[Section], key: str, value: Any) -> None:
    item = fields_of(kind).get(key)
    if item is None:
        raise ConfigError(_unknown_key(kind, key))
    accepted = types_of(kind)[key]
    limits = item.metadata
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if type(value) not in accepted and not (type(value) is int and float in accepted):
        wanted = " or ".join(_TYPE_NAMES[t] for t in accepted if t in _TYPE_NAMES)
    elif value is None:
        return
    elif limits["choices"] and value not in limits["choices"]:
        wanted = ("one of " if len(limits["choices"]) > 1 else "") + ", ".join(map(str, limits["choices"]))
    elif limits["check"] and (problem := limits["check"](value)):
        wanted = problem
    elif number and not _within(value, limits["low"], limits["high"]):
        wanted = _range(limits["low"], limits["high"])
    else:
        return
    raise ConfigError(f"{kind.section}.{key} = {value!r} is not accepted; it must be {wanted}")


def _within(value: float, low, high) -> bool:
    return math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high)


def _range(low, high) -> str:
    if high is None:
        return f"at least {low}" if low is not None else "finite"
    return f"between {low} and {high}"


def _unknown_key(kind: type[Section], key: str) -> str:
    elsewhere = [other.section for other in Section.__subclasses__() if key in fields_of(other)]
    keys = ", ".join(fields_of(kind)) or "no keys so far"
    hint = f"; did you mean {elsewhere[0]}.{key}?" if elsewhere else close_match(key, fields_of(kind))
    return f"no setting {kind.section}.{key}{hint}; section {kind.section} has {keys}"


def fields_of(kind: type[Section]) -> dict[str, dataclasses.Field]:
    return {item.name: item for item in dataclasses.fields(kind)}


def types_of(kind: type[Section]) -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(kind)
    return {name: typing.get_args(hints[name]) or (hints[name],) for name in fields_of(kind)}


def close_match(name: str, names: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {match[0]}?" if match else ""
