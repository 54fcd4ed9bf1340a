"""The Ray cluster: joining or starting one, what fits on it, and what went wrong there in plain words."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from typing import Any

from jaxinfer.config import MeshShape, Settings
from jaxinfer.errors import ConfigError

LOCAL = ""
"""The address of a cluster on this machine, for this run."""

_REACH_SECONDS = 5.0
_OBJECT_STORE = 256 * 2**20  # requests and answers are small
_DEFAULT_PORT = 6379
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    (0, 0, 0, 4, 0, 0, 0, 0, 0)
)  # and empty settings, of type 4
_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}  # a progress bar is on the screen


def require_ray() -> Any:
    """The module. Raises ConfigError if it is not installed."""
    try:
        import ray
    except ImportError:
        raise ConfigError("several workers need Ray: pip install 'jaxinfer[ray]'") from None
    return ray


def join(address: str) -> Any:
    """Ray's module, connected: to the cluster at `address`, to one that this process has joined before, or to a new local one.

    Raises:
      ConfigError: Ray is not installed, or no cluster answers at the address.
    """
    ray = require_ray()
    if ray.is_initialized():
        return ray
    with _signal_handlers_kept():
        if address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # "local": without it Ray looks for a cluster that runs, and one that has ended may have left its address.
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **_QUIET)
            return ray
        if address != "auto":
            _reach(address)
        try:
            ray.init(address=address, **_QUIET)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"--ray {address}: no Ray cluster answers there: {reason}") from None
    return ray


def _reach(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host and ":" not in address:
        host, port = port, str(_DEFAULT_PORT)
    if not (host and port.isascii() and port.isdigit()):
        raise ConfigError(f"--ray {address}: expected HOST:PORT, ray://HOST:PORT or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS) as link:
            if os.environ.get("RAY_USE_TLS", "0") != "1" and not _speaks_http2(link):
                raise ConfigError(f"--ray {address}: what answers there is no Ray cluster")
    except (OSError, OverflowError, UnicodeError) as error:  # the last for names that cannot be one
        raise ConfigError(f"--ray {address}: no Ray cluster answers there: {error}") from None


def _speaks_http2(link: socket.socket) -> bool:
    """As Ray does; it would wait for minutes for something else to say what only a Ray cluster can."""
    link.sendall(_HTTP2_HELLO)
    return link.recv(9)[3:4] == _HTTP2_HELLO[-6:-5]


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Ray puts a handler of its own for SIGTERM, which would end the process without a word on what is safe."""
    terminated = False
    try:
        kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        yield
    except SystemExit:  # Ray's handler has run
        terminated = True
    finally:
        with contextlib.suppress(ValueError):  # not the main thread, where Ray puts none either
            for number, handler in kept.items():
                signal.signal(number, handler)
    if terminated:
        signal.raise_signal(signal.SIGTERM)


def resources(ray: Any, settings: Settings) -> tuple[int, dict[str, float]]:
    """How many workers to start, and what each takes, as Ray's options. A worker whose model is spread over a mesh takes a GPU for
    each device of it.

    Raises:
      ConfigError: the cluster has no room for them.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    scaleout, gpus = settings.scaleout, settings.scaleout.gpus
    if gpus is None:
        gpus = float(_devices(settings)) if any(node.get("GPU") for node in nodes) else 0.0
    needs = {"CPU": scaleout.cpus, "GPU": gpus}
    room = sum(_fits(node, needs) for node in nodes)
    wanted = scaleout.workers
    if wanted is None:
        wanted = room if gpus else sum(_fits(node, needs) > 0 for node in nodes)
    if room < max(wanted, 1):
        each = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
        raise ConfigError(
            f"scaleout.workers = {max(wanted, 1)}: the cluster has room for {room} workers of {each} each; "
            "lower scaleout.workers, scaleout.cpus, scaleout.gpus or engine.mesh"
        )
    return wanted, {"num_cpus": scaleout.cpus, "num_gpus": gpus}


def _devices(settings: Settings) -> int:
    """That one worker's model is on."""
    mesh = settings.engine.mesh
    return mesh.tensor * mesh.expert if isinstance(mesh, MeshShape) else 1


def _fits(node: dict[str, float], needs: dict[str, float]) -> int:
    return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items() if amount)


def cause_of(error: Exception) -> BaseException:
    """What a worker raised itself; `error` if its process ended instead."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def reason_of(error: Exception) -> str:
    """Why a worker ended, in one line."""
    cause = cause_of(error)
    if cause is not error:
        return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
    detail = re.search(r"Worker exit detail: ([^.\n]*)", str(error))
    if detail:
        return f"its process ended: {detail[1]}"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
