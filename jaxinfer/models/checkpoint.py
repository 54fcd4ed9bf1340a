"""Restores converted models: parts of Orbax checkpoints become arrays on devices, piece by piece."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ModelError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import abstract, unstack, without_experts
from jaxinfer.models.layers import Decoder
from jaxinfer.models.manifest import PARAMS, Manifest, Part, Piece, checksum, read_manifest, size_on_disk
from jaxinfer.models.placement import Placement, Slot

_LAYER_LEAF = re.compile(r"layers\.(?P<layer>\d+)\.(moe\.experts\.(?P<expert>\d+)\.)?(?P<name>.+)")
READ_AHEAD = 4  # parts being read while another is placed on the device

__all__ = ["Manifest", "load_model", "of_expert", "read_manifest", "read_pieces"]


def load_model(
    folder: str | Path,
    *,
    dtype: Any = None,
    layout: Literal["stacked", "unstacked"] = "stacked",
    sharding: Any = None,
    experts: bool = True,
) -> tuple[ModelConfig, Decoder]:
    """Restores a converted model straight into device arrays; the host never holds more than a few parts of it.

    Args:
      folder: what jaxinfer-convert wrote.
      dtype: of the parameters in memory, and of the config returned; the stored one if None. Packed arrays keep theirs.
      layout: "stacked" runs of layers for scan, or "unstacked" single layers (see `decoder.unstack`).
      sharding: one jax.sharding.Sharding for all parameters, a Decoder of them, or a function of a parameter's path and shape
        that gives its Placement; the default device if None.
      experts: False leaves the experts of mixture-of-experts layers out (`decoder.without_experts`).

    Raises:
      ModelError: the folder is missing, foreign, corrupt, or does not match its own config.
    """
    manifest = read_manifest(folder)
    config = manifest.config if dtype is None else replace(manifest.config, dtype=jnp.dtype(dtype).name)
    tree = abstract(config) if experts else without_experts(abstract(config))
    if layout == "unstacked":
        stacked = tree
        tree = jax.eval_shape(
            lambda: unstack(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), stacked), config)
        )
    named, treedef = jax.tree_util.tree_flatten_with_path(tree)
    placements = _placements(sharding, named, treedef)
    slots = {_name(path): Slot(leaf.dtype, place) for (path, leaf), place in zip(named, placements)}
    places = {
        piece: _place(piece, config, layout)
        for part in manifest.parts
        for piece in part.pieces
        if experts or not of_expert(piece)
    }
    _check_cover(Path(folder), places, slots)
    for piece, block in read_pieces(folder, manifest, places.__contains__):
        name, start = places[piece]
        if not jnp.issubdtype(slots[name].dtype, jnp.floating) and slots[name].dtype != block.dtype:
            raise ModelError(f"{folder}: {piece.key} holds {block.dtype}, should be {slots[name].dtype.name}")
        slots[name].put(start, block)
    return config, jax.tree.unflatten(treedef, [slot.array() for slot in slots.values()])


def of_expert(piece: Piece) -> tuple[int, int] | None:
    """Layer and expert whose weights a piece belongs to; None for all else."""
    parsed = _LAYER_LEAF.fullmatch(piece.leaf)
    return (int(parsed["layer"]), int(parsed["expert"])) if parsed and parsed["expert"] else None


def read_pieces(
    folder: str | Path, manifest: Manifest, wanted: Callable[[Piece], object] = lambda piece: True
) -> Iterator[tuple[Piece, np.ndarray]]:
    """The wanted pieces of a converted model in stored order, as host arrays in the stored type; reads a little ahead.

    Raises:
      ModelError: a part is missing or corrupt.
    """
    for part in manifest.parts:
        path = Path(folder) / PARAMS / part.name
        if (size := size_on_disk(path)) != part.nbytes:
            raise ModelError(
                f"{path}: is incomplete: {size} bytes of {part.nbytes}; copy or convert the model again"
            )
    parts = [part for part in manifest.parts if any(map(wanted, part.pieces))]
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        todo, reading = iter(parts), deque[Future[list[np.ndarray]]]()
        for part in parts:
            while len(reading) <= READ_AHEAD and (following := next(todo, None)):
                reading.append(pool.submit(_read_part, Path(folder), following))
            for piece, block in zip(part.pieces, reading.popleft().result()):
                if wanted(piece):
                    yield piece, block


def _read_part(folder: Path, part: Part) -> list[np.ndarray]:
    from orbax.checkpoint import Checkpointer, PyTreeCheckpointHandler
    from orbax.checkpoint.options import MultiprocessingOptions

    path = (folder / PARAMS / part.name).absolute()
    # Every process reads for itself: Orbax would otherwise make all processes wait for each other at every part.
    alone = MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    handler = PyTreeCheckpointHandler(multiprocessing_options=alone)
    try:
        stored = Checkpointer(handler, multiprocessing_options=alone).restore(path)
        blocks = [np.asarray(stored[piece.key]) for piece in part.pieces]
    except Exception as error:  # Orbax and tensorstore raise many kinds for a damaged checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: a part of the model cannot be read: {reason}") from error
    shapes = [block.shape for block in blocks]
    types_match = all(p.dtype in (None, block.dtype.name) for p, block in zip(part.pieces, blocks))
    whole = shapes == [piece.shape for piece in part.pieces] and checksum(blocks) == part.crc32
    if not (types_match and whole):
        raise ModelError(f"{path}: a part of the model is corrupt; convert the model again")
    return blocks


def _place(piece: Piece, config: ModelConfig, layout: str) -> tuple[str, tuple[int, ...]]:
    """The parameter in memory that a piece belongs to, and where in it."""
    parsed = _LAYER_LEAF.fullmatch(piece.leaf)
    if parsed is None:
        return piece.leaf, piece.start
    within, name, start = int(parsed["layer"]), parsed["name"], piece.start
    if parsed["expert"]:
        name, start = f"mlp.{name}", (int(parsed["expert"]), *start)
    run = 0
    while run < len(config.runs) - 1 and within >= config.runs[run][1]:
        within -= config.runs[run][1]
        run += 1
    if layout == "stacked":
        return f"runs.{run}.{name}", (within, *start)
    return f"runs.{run}.{within}.{name}", start


def _check_cover(
    folder: Path, places: dict[Piece, tuple[str, tuple[int, ...]]], slots: dict[str, Slot]
) -> None:
    """The pieces must fill every parameter of `abstract(config)`, and nothing else."""
    filled = dict.fromkeys(slots, 0)
    for piece, (name, start) in places.items():
        if name not in slots or not slots[name].holds(start, piece.shape):
            raise ModelError(
                f"{folder}: does not match its own config: {piece.key} of shape {list(piece.shape)}"
            )
        filled[name] += math.prod(piece.shape)
    short = [name for name, slot in slots.items() if filled[name] != math.prod(slot.shape)]
    if short:
        raise ModelError(f"{folder}: does not match its own config: incomplete are {', '.join(short[:8])}")


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _placements(sharding: Any, named: list[tuple[Any, Any]], treedef: Any) -> list[Placement]:
    if callable(sharding):
        return [sharding(_name(path), leaf.shape) for path, leaf in named]
    if sharding is None:
        sharding = jnp.zeros(()).sharding  # wherever JAX would put an array now
    every = [sharding] * len(named)
    if not isinstance(sharding, jax.sharding.Sharding):
        every = treedef.flatten_up_to(sharding)
    return [Placement.of(leaf.shape, to) for (_, leaf), to in zip(named, every)]
