"""Fixtures for all tests."""

import gc
import sys
from pathlib import Path

import pytest

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
