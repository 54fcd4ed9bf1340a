"""Picks an implementation: the platform's own kernel first, the XLA twin where the kernel says it cannot."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

logger = logging.getLogger("pallas_kernels")

_ORDER = {"cpu": ("cpu", "xla"), "gpu": ("mosaic_gpu", "xla")}
_already_said: set[tuple[str, str, str]] = set()


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs `implementation`, or the first of the platform's order that does not raise NotImplementedError.

    A named implementation is never replaced by another: its NotImplementedError reaches the caller.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"{op}: unknown implementation {implementation!r}; one of {sorted(implementations)}"
            )
        return implementations[implementation](*args, **kwargs)
    for name in _ORDER.get(jax.default_backend(), ("xla",)):
        if name == "xla":
            break
        if name not in implementations:
            continue
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as error:
            _say_once(op, name, str(error))
    return implementations["xla"](*args, **kwargs)


def _say_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _already_said:
        _already_said.add((op, name, reason))
        logger.warning("%s: the %s kernel is not used, XLA takes its place: %s", op, name, reason)
