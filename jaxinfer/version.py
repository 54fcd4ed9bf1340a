"""Which jaxinfer this is."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

_PACKAGES = ("jaxinfer", "pallas_kernels")


@functools.cache
def package_version() -> str:
    """The version of jaxinfer, and a hash over its sources: two checkouts of one version may differ."""
    try:
        version = importlib.metadata.version("jaxinfer")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    hasher = hashlib.blake2b(digest_size=4)
    root = Path(__file__).parents[1]
    for file in sorted(file for name in _PACKAGES for file in (root / name).rglob("*.py")):
        hasher.update(str(file.relative_to(root)).encode())
        hasher.update(file.read_bytes())
    return f"{version}, sources {hasher.hexdigest()}"
