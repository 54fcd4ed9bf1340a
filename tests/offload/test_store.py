"""The file of records: what is in it, when it is written, and what happens when it cannot be."""

import os

import numpy as np
import pytest

from jaxinfer.config import OffloadSettings
from jaxinfer.errors import ConfigError
from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models.checkpoint import load_model, read_manifest
from jaxinfer.offload.records import expert_record
from jaxinfer.offload.store import ExpertStore
from pallas_kernels.packed_experts import Record


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(EMBEDDED_MODEL)


def of(manifest, experts):
    return expert_record(manifest.config, OffloadSettings(experts=experts), "float32")


def test_holds_every_expert_of_the_model(manifest, tmp_path):
    config, model = load_model(EMBEDDED_MODEL)
    record = Record(config.hidden_size, config.moe.width, "bfloat16")
    store = ExpertStore.open(EMBEDDED_MODEL, manifest, record, str(tmp_path))
    assert store.layers == tuple(range(config.layers)) and store.experts == config.moe.experts
    assert store.nbytes == config.layers * config.moe.experts * record.nbytes
    (run,) = model.runs
    for layer in range(config.layers):
        for expert in range(config.moe.experts):
            packed = record.pack(
                np.asarray(run.mlp.gate_up)[layer, expert], np.asarray(run.mlp.down)[layer, expert]
            )
            np.testing.assert_array_equal(store.of_layer(layer)[expert], packed)


def test_is_written_once_and_again_when_it_is_not_whole(manifest, tmp_path):
    first = ExpertStore.open(EMBEDDED_MODEL, manifest, of(manifest, "int4"), str(tmp_path))
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    again = ExpertStore.open(EMBEDDED_MODEL, manifest, of(manifest, "int4"), str(tmp_path))
    assert path.stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(first.records, again.records)
    kept = np.array(first.records)
    os.truncate(path, 1000)
    np.testing.assert_array_equal(
        ExpertStore.open(EMBEDDED_MODEL, manifest, of(manifest, "int4"), str(tmp_path)).records, kept
    )
    ExpertStore.open(EMBEDDED_MODEL, manifest, of(manifest, "int8"), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2  # one for each format, and nothing half-written


def test_forgotten_experts_come_back(manifest, tmp_path):
    store = ExpertStore.open(EMBEDDED_MODEL, manifest, of(manifest, "stored"), str(tmp_path))
    before = np.array(store.records)
    for row in range(len(store.layers)):
        for expert in range(store.experts):
            store.forget(row, expert)
    np.testing.assert_array_equal(store.records, before)


def test_a_folder_that_cannot_be_written(manifest, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"offload\.folder.*cannot be written"):
        ExpertStore.open(EMBEDDED_MODEL, manifest, of(manifest, "stored"), str(tmp_path / "file" / "below"))


def test_a_write_that_fails_leaves_nothing(manifest, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        ExpertStore.open(EMBEDDED_MODEL, manifest, of(manifest, "stored"), str(tmp_path))
    assert not list(tmp_path.iterdir())
