"""What is measured once a machine, kept in the user's cache folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxinfer.errors import ConfigError


def kept[T](
    name: str,
    make: Callable[[], T],
    *,
    write: Callable[[T], Any],
    read: Callable[[Any], T],
    folder: str | os.PathLike | None = None,
) -> T:
    """The value of that name, made if there is none yet; a file that does not hold one is replaced.

    Args:
      write, read: to JSON and back; `read` raises ConfigError, ValueError, TypeError or KeyError for what is no value.
      folder: another one to keep it in.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfer"
    file = Path(folder or home) / f"{name}.json"
    try:
        return read(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError, ConfigError):
        pass
    value = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(write(value)))
    part.replace(file)
    return value
