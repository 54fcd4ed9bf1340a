"""Which implementation runs, and what is said about it."""

import logging
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _dispatch
from pallas_kernels._cpu import register
from pallas_kernels.kv_write import kv_write


def arguments():
    pool = jnp.zeros((2, 3, 1, 8, 8))
    new = jnp.ones((4, 1, 8))
    return pool, pool, 1, new, new, jnp.array([1, 9, -1, 20])


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(_dispatch, "_already_said", set())
    monkeypatch.setattr(register, "_registered", {})


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"'gpu'.*'cpu', 'xla'"):
        kv_write(*arguments(), implementation="gpu")


@pytest.mark.parametrize("reason", ["numba", "interface"])
def test_falls_back_to_xla_and_says_so_once(monkeypatch, caplog, fresh, reason):
    if reason == "numba":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        monkeypatch.setattr(register, "API_MAJOR", 99)
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        first, again = kv_write(*arguments()), kv_write(*arguments())
    want = kv_write(*arguments(), implementation="xla")
    np.testing.assert_array_equal(first, want)
    np.testing.assert_array_equal(again, want)
    assert [r.message.split(":")[0] for r in caplog.records] == ["kv_write"]
    with pytest.raises(NotImplementedError):
        kv_write(*arguments(), implementation="cpu")
