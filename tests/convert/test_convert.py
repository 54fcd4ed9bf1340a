"""Conversion: what is refused, and that the output is whole or absent."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from folders import CONFIG, random_tensors, read_tensors, write_folder

from convert import output
from convert.convert import convert
from jaxinfer.errors import ModelError
from jaxinfer.models.checkpoint import load_model, read_manifest

TOKENIZER = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 63}, "unk_token": "a"}, "added_tokens": []}
NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def source(tmp_path):
    return write_folder(tmp_path / "source")


def test_one_file_and_shards_make_the_same_model(tmp_path, source):
    shards = write_folder(tmp_path / "shards", random_tensors(), shards=3)
    convert(source, tmp_path / "a")
    convert(shards, tmp_path / "b")
    (_, one), (_, other) = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_nothing_in_the_output_names_the_machines_folders(tmp_path, source):
    convert(source, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and not [path for path in files if str(tmp_path).encode() in path.read_bytes()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "stored", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_values_are_rounded_once(tmp_path, stored, dtype):
    source = write_folder(tmp_path / "source", random_tensors(dtype=stored))
    convert(source, tmp_path / "out", dtype=dtype)
    config, model = load_model(tmp_path / "out")
    assert config.dtype == dtype
    embed = read_tensors(source)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.asarray(model.embed), embed.astype(np.asarray(model.embed).dtype))


def test_the_manifest_names_its_sources(tmp_path, source):
    (source / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    convert(source, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    files = ("config.json", "chat_template.jinja", "model.safetensors", "tokenizer.json")
    assert manifest.sources == {f: hashlib.sha256((source / f).read_bytes()).hexdigest() for f in files}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_fingerprint_follows_content_not_time(tmp_path, source):
    prints = [convert(source, tmp_path / name).fingerprint for name in ("a", "b")]
    assert prints[0] == prints[1] == read_manifest(tmp_path / "a").fingerprint
    assert convert(source, tmp_path / "c", dtype="bfloat16").fingerprint != prints[0]
    tensors = random_tensors()
    tensors["lm_head.weight"][0, 0] += 1
    assert convert(write_folder(tmp_path / "other", tensors), tmp_path / "d").fingerprint != prints[0]


def test_all_wrong_tensors_are_listed_at_once(tmp_path):
    tensors = random_tensors()
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    tensors["model.norm.weight"] = np.ones(17, np.float32)
    tensors["model.layers.0.surprise"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    source = write_folder(tmp_path / "source", tensors)
    with pytest.raises(ModelError) as caught:
        convert(source, tmp_path / "out")
    for part in (
        r"1 missing: model.layers.1.block_sparse_moe.experts.3.w2.weight [16, 24]",
        "1 unknown: model.layers.0.surprise",
        "1 misshapen: model.norm.weight is [17], should be [16]",
        "1 not floating-point: lm_head.weight is int8",
    ):
        assert part in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", json.dumps(CONFIG | {"model_type": "wonder"}), "'wonder'; accepted: llama"),
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", NESTED, "cannot be read as JSON"),
        ("config.json", "[]", "holds list, not an object"),
        ("generation_config.json", "nothing", "cannot be read as JSON"),
        ("tokenizer.json", "{}", "is not a tokenizer file"),
        ("tokenizer.json", NESTED, "is not a tokenizer file"),
        ("tokenizer.json", json.dumps({"model": {"vocab": {}}}), "source: its tokenizer cannot be read"),
        ("tokenizer.model", "nonsense", "source: its tokenizer cannot be read"),
        ("model.safetensors", "", "truncated"),
    ],
)
def test_folders_that_make_no_sense(tmp_path, source, file, text, message):
    (source / file).write_text(text)
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": {"a": 0, "b": 64}}},
        {"model": {"vocab": [["a", 0.0]] * 65}},
        TOKENIZER | {"added_tokens": [{"id": 64, "content": "<x>"}]},
    ],
)
def test_a_tokenizer_larger_than_the_embedding(tmp_path, source, tokenizer):
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="tokenizer has 65 tokens, the embedding only 64 rows"):
        convert(source, tmp_path / "out")


def test_a_tokenizer_that_cannot_be_loaded_is_found_before_anything_is_written(tmp_path, source):
    (source / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    for broken in ("{", "[]", NESTED, json.dumps({"tokenizer_class": "WonderTokenizer", "auto_map": 5})):
        (source / "tokenizer_config.json").write_text(broken)
        with pytest.raises(ModelError, match="source: its tokenizer cannot be read"):
            convert(source, tmp_path / "out", progress=lambda done, total: pytest.fail("it was written"))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    added = {"added_tokens_decoder": {"64": {"content": "<x>", "special": True}}}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": [f"<{i}>" for i in range(63)],
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config | added))
    with pytest.raises(ModelError, match="the embedding only 64 rows"):
        convert(source, tmp_path / "out")


def test_an_existing_folder_is_kept_unless_it_may_be_replaced(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ModelError, match="exists already"):
        convert(source, out)
    with pytest.raises(ModelError, match="not a converted model"):
        convert(source, out, overwrite=True)
    (out / "precious").unlink()
    out.rmdir()
    convert(source, out)
    with pytest.raises(ModelError, match="--overwrite"):
        convert(source, out)
    convert(source, out, dtype="bfloat16", overwrite=True)
    assert read_manifest(out).dtype == "bfloat16"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_full_disk_is_seen_beforehand(tmp_path, source, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ModelError, match=r"needs 0\.1 GB of disk, 0\.0 GB are free"):
        convert(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_an_error_on_the_way_leaves_nothing(tmp_path, source):
    def fail(done, total):
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="No space left"):
        convert(source, tmp_path / "out", progress=fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_tied_heads_are_not_stored_twice(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    convert(write_folder(tmp_path / "source", tensors, config), tmp_path / "out")
    assert load_model(tmp_path / "out")[1].head is None


def test_real_checkpoints(tmp_path, shared_data):
    for name in ("stories260K", "babyllama105-moe"):
        source = shared_data(f"checkpoints/{name}")
        convert(source, tmp_path / name)
        config, model = load_model(tmp_path / name, layout="unstacked")
        queries = read_tensors(source)["model.layers.3.self_attn.q_proj.weight"]
        stored = np.asarray(model.runs[0][3].attention.qkv)[:, :, : config.group]
        np.testing.assert_array_equal(stored.reshape(config.hidden_size, -1).T, queries)
        shutil.rmtree(tmp_path / name)
