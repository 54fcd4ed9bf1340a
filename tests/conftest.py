"""Fixtures for all tests."""

import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# What one file or an earlier run has compiled is not compiled again: it is most of the tests' time.
CACHES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHES / "jaxinfer" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# XLA's threads. Each warpgroup that waits in the GPU's simulator holds one, and a cluster has six: with as many threads as a small
# machine has cores they wait for one another for ever.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

# The same examples in every run; others with `pytest --hypothesis-profile=search`.
settings.register_profile("search", deadline=None)
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data():
    """shared_data("checkpoints/stories260K") -> its path; the test is skipped, by name, where it is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"../shared/data/{name} is not there")
        return SHARED / name

    return find


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Forget compiled programs after each file: each takes a hundred or more memory maps, a process may have 65,530, and LLVM
    aborts where there are no more."""
    yield
    if "helpers" in sys.modules:
        sys.modules["helpers"]._PROGRAMS.clear()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
