"""The safetensors reader against the safetensors library, and against damaged files."""

import contextlib
import json

import ml_dtypes
import numpy as np
import pytest
from folders import random_tensors, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from convert.reader import SourceFolder, read_header
from jaxinfer.errors import ModelError

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.int8, np.uint8, np.bool_]
SMALL = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)})


def test_headers_and_indices_nested_too_deeply(tmp_path):
    nested = b"[" * 100_000 + b"]" * 100_000
    (tmp_path / "model.safetensors.index.json").write_bytes(nested)
    with pytest.raises(ModelError, match="is not a safetensors index"):
        SourceFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(nested).to_bytes(8, "little") + nested)
    with pytest.raises(ModelError, match="header is corrupt"):
        SourceFolder(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_values_are_those_written(tmp_path, dtype):
    written = {"x": (np.arange(60) % 7).reshape(3, 4, 5).astype(dtype), "scalar": np.ones((), dtype)}
    save_file(written | {"empty": np.zeros((0, 4), dtype)}, tmp_path / "model.safetensors")
    folder = SourceFolder(tmp_path)
    for name, array in written.items():
        assert folder.view(name).dtype == array.dtype
        np.testing.assert_array_equal(folder.view(name), array)
        folder.release()
        np.testing.assert_array_equal(folder.view(name), array)
    assert folder.view("empty").shape == (0, 4)


def test_shards_are_one_model(tmp_path):
    tensors = random_tensors()
    folder = SourceFolder(write_folder(tmp_path, tensors, shards=3))
    assert len(folder.files) == 3
    assert set(folder.tensors) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(folder.view(name), array)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(SMALL) - 1))
def test_any_truncation_is_a_model_error(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    path.write_bytes(SMALL[:length])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_header(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SMALL) - 1), st.integers(1, 255))
def test_a_changed_byte_raises_nothing_but_model_errors(tmp_path_factory, at, change):
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    path.write_bytes(SMALL[:at] + bytes([SMALL[at] ^ change]) + SMALL[at + 1 :])
    with contextlib.suppress(ModelError):
        SourceFolder(path.parent)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}, "dtype 'Q4'"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "needs 12 bytes"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, "'a'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "begins at"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "its tensors end at"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "truncated"),
        ({"a": 3}, "corrupt"),
        ([], "corrupt"),
    ],
)
def test_headers_that_lie(tmp_path, header, message):
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(ModelError, match=message):
        read_header(path)


def test_what_a_folder_lacks(tmp_path):
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        SourceFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which are not read"):
        SourceFolder(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        SourceFolder(tmp_path)


def test_shards_that_are_missing_or_lack_tensors(tmp_path):
    write_folder(tmp_path, shards=3)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map | {"not.there": shard}}))
    with pytest.raises(ModelError, match=r"not\.there"):
        SourceFolder(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(ModelError, match=f"1 of 3 shards are missing: {shard}"):
        SourceFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ModelError, match="not a file name"):
        SourceFolder(tmp_path)
