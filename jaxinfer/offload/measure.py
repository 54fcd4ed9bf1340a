"""Measures what an expert costs on this machine, once, and remembers it."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.offload.host_experts import LayerExperts
from jaxinfer.offload.latency import Costs, Engine
from jaxinfer.offload.pool import bring
from jaxinfer.offload.store import ExpertStore
from pallas_kernels.packed_experts import Record, packed_experts

logger = logging.getLogger("jaxinfer")

TOKENS = (1, 64)  # few enough to wait for memory, and enough not to
_ROUNDS = 7
_VERSION = 3  # of the kernels and of what is measured


@dataclass(frozen=True)
class MachineProfile:
    """Attributes:
    machine: that was measured.
    host, device: seconds of one expert for each of `TOKENS`.
    link: seconds of one expert's weights to the device.
    ask: seconds of a question to the host that it answers at once; infinite where host and device are the same cores.
    """

    machine: str
    host: tuple[float, ...]
    device: tuple[float, ...]
    link: float
    ask: float

    @property
    def costs(self) -> Costs:
        return Costs(host=_engine(self.host), device=_engine(self.device), link=self.link, ask=self.ask)


def _engine(seconds: tuple[float, ...]) -> Engine:
    return Engine(flat=seconds[0], per_token=seconds[-1] / TOKENS[-1])


def this_machine() -> str:
    """Processor, cores and device, as the profile names them."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    processor = found[1].strip() if found else platform.processor()
    return f"{processor}, {os.cpu_count()} cores, {jax.local_devices()[0].device_kind}"


def machine_profile(
    store: ExpertStore,
    records: jax.Array,
    host: LayerExperts,
    *,
    activation: str,
    folder: Path,
    threads: int | None,
) -> MachineProfile:
    """The profile of this machine for experts of this shape: remembered in `folder`, or measured and written there.

    A profile of another machine, or one that cannot be read, is measured again, and that is said.
    """
    record = store.record
    name = f"{record.model_dim}x{record.hidden_dim}-{record.format}-{record.group}-{activation}-{threads or 'all'}-{_VERSION}"
    path = folder / f"{name}.json"
    profile = _remembered(path)
    if profile is None:
        profile = _measure(store, records, host, activation)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(profile), indent=1) + "\n")
        except OSError as error:
            logger.warning("%s: the machine profile cannot be kept, so every start measures: %s", path, error)
    return profile


def _remembered(path: Path) -> MachineProfile | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
        profile = MachineProfile(
            str(data["machine"]),
            tuple(data["host"]),
            tuple(data["device"]),
            float(data["link"]),
            float(data["ask"]),
        )
        times = np.array([*profile.host, *profile.device, profile.link, profile.ask], np.float64)
        if len(times) != 2 * len(TOKENS) + 2 or not (times > 0).all():
            raise ValueError("expected positive seconds")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(
            "%s: not a machine profile (%s: %s); measuring again", path, type(error).__name__, error
        )
        return None
    if profile.machine != this_machine():
        logger.warning(
            "%s: is of another machine (%s); measuring this one (%s)", path, profile.machine, this_machine()
        )
        return None
    return profile


def _measure(store: ExpertStore, records: jax.Array, host: LayerExperts, activation: str) -> MachineProfile:
    record = store.record
    count = min(store.experts, 4)  # in turn, so that none is found in a cache that it would not be in
    fetch = jax.jit(bring)
    link = _median([partial(_wait_for, fetch, (records, np.int32(expert))) for expert in range(count)])
    pool = fetch(records, np.int32(0))
    on_host, on_device = [], []
    run = jax.jit(partial(_on_device, record=record, activation=activation))
    for tokens in TOKENS:
        x = np.full((tokens, record.model_dim), 0.01, np.float32)
        shares = np.ones((tokens, 1), np.float32)
        each = [np.full((tokens, 1), expert, np.int32) for expert in range(count)]
        on_host.append(_median([partial(host.compute, 0, x, ids, shares) for ids in each]))
        given = (jnp.asarray(x), jnp.zeros((tokens, 1), jnp.int32), jnp.asarray(shares), pool)
        on_device.append(_median([partial(_wait_for, run, given)]))
    return MachineProfile(
        this_machine(), tuple(on_host), tuple(on_device), link, _ask_seconds(record.model_dim)
    )


def _ask_seconds(width: int) -> float:
    """Of a callback that is given a token and gives one back."""
    if jax.default_backend() == "cpu":
        return float("inf")
    token = jnp.zeros((1, width), jnp.float32)
    ask = jax.jit(partial(jax.pure_callback, np.asarray, token))
    return _median([partial(_wait_for, ask, (token,))])


def _on_device(x, ids, shares, array, *, record: Record, activation: str):
    return packed_experts(x, array, ids, shares, record=record, activation=activation)


def _wait_for(run: Callable, given: tuple) -> None:
    jax.block_until_ready(run(*given))


def _median(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call; the first calls warm up."""
    times = []
    for call in list(calls) * (1 + -(-_ROUNDS // len(calls))):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times[len(calls) :]))
