"""The folder being written: a hidden sibling that takes the final name only when it is whole and on disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxinfer.errors import ModelError
from jaxinfer.models.manifest import MANIFEST

SPARE = 64 << 20  # bytes beside the parameters: manifest, tokenizer, Orbax's metadata


@contextlib.contextmanager
def new_folder(out: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder beside `out` that becomes `out` at the end of a block that raises nothing.

    Args:
      size: bytes that will be written, for which the disk must have room.
      overwrite: an `out` that is a converted model may be replaced.

    Raises:
      ModelError: `out` exists, or the disk is too small or cannot be written.
    """
    _check_free_to_write(out, overwrite)
    building = _begin(out, size)
    lock = os.open(building, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tells other runs that this folder is not abandoned
        yield building
        os.sync()
        _replace(building, out)
    except OSError as error:
        raise ModelError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        os.close(lock)


def _check_free_to_write(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ModelError(f"{out}: exists already; give another name, or --overwrite to replace it")
    if not (out / MANIFEST).is_file():
        raise ModelError(f"{out}: is not a converted model, so it is not overwritten; remove it yourself")


def _begin(out: Path, size: int) -> Path:
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(parent, out.name)
        free = shutil.disk_usage(parent).free
        if free < size + SPARE:
            raise ModelError(
                f"{out}: needs {(size + SPARE) / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free at {parent}"
            )
        return Path(tempfile.mkdtemp(prefix=_prefix(out.name), dir=parent))
    except OSError as error:
        raise ModelError(f"{out}: cannot be written: {error.strerror or error}") from error


def _prefix(name: str) -> str:
    return f".{name}.converting-"


def _clear_abandoned(parent: Path, name: str) -> None:
    """Removes what killed runs left: their folders, unlike those of live runs, are not locked."""
    for path in parent.iterdir():
        if not path.name.startswith(_prefix(name)):
            continue
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _replace(building: Path, out: Path) -> None:
    building.chmod(0o777 & ~_umask())  # mkdtemp makes it private
    old = building.with_name(f"{building.name}-replaced")
    if out.exists():
        out.rename(old)
    building.rename(out)
    parent = os.open(out.absolute().parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
