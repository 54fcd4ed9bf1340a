"""Settings: defaults, files, overrides, and that every error says what would be accepted."""

import dataclasses
from pathlib import Path

import pytest

from jaxinfer.config import CacheSettings, EngineSettings, Settings, load_config
from jaxinfer.errors import ConfigError
from jaxinfer.fields import parse_memory

PRESETS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_change_something(path):
    assert load_config(path) != Settings()


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[engine]\nmax_seqs = 3\nchunk = 32\n[cache]\nprefix_sharing = false\n")
    settings = load_config(file, ["engine.max_seqs=5", "engine.max_seqs = 7"])
    assert (settings.engine.max_seqs, settings.engine.chunk, settings.cache.prefix_sharing) == (7, 32, False)


@pytest.mark.parametrize(
    "text, value",
    [
        ("engine.layers=scan", "scan"),
        ('engine.layers="scan"', "scan"),
        ("model.path=/a/b c", "/a/b c"),
        ("model.path=123", "123"),
        ("engine.max_context=4096", 4096),
        ("cache.memory=0.5", 0.5),
        ("cache.memory=8GiB", "8GiB"),
        ("cache.prefix_sharing=false", False),
        ("batch.flush_seconds=1", 1),
    ],
)
def test_override_values(text, value):
    section, key = text.split("=")[0].split(".")
    assert getattr(getattr(load_config(None, [text]), section), key) == value


@pytest.mark.parametrize(
    "text, said",
    [
        ("engine.max_seq=4", ["engine.max_seq", "did you mean max_seqs"]),
        ("engin.max_seqs=4", ["no section 'engin'", "did you mean engine"]),
        ("cache.max_seqs=4", ["did you mean engine.max_seqs"]),
        ("engine.max_seqs=0", ["engine.max_seqs = 0", "between 1 and"]),
        ("engine.max_seqs=true", ["True", "a whole number"]),
        ("engine.max_seqs=1.5", ["1.5", "a whole number"]),
        ("engine.layers=fast", ["'fast'", "auto, scan, unrolled"]),
        ("cache.page_size=7", ["8, 16, 32"]),
        ("cache.memory=1.5", ["1.5", "a share in (0, 1]"]),
        ("cache.memory=lots", ["'lots'", "8GiB"]),
        ("batch.flush_seconds=nan", ["nan", "between 0 and"]),
        ("batch.sync_seconds=inf", ["inf", "between 0 and"]),
        ("sparsity.mode=fast", ["'fast'", "shared, paper, kernel"]),
        ("sparsity.token_budget=-16", ["-16", "at least 0"]),
        ("offload.slots=1", ["no setting offload.slots"]),
        ("engine=4", ["section.key=value"]),
        ("max_seqs", ["section.key=value"]),
        ("engine.max_seqs=[1]", ["[1]", "a whole number"]),
        ("engine.seed=99999999999999999999999", ["between"]),
        ("engine.chunk.size=1", ["engine.chunk.size"]),
    ],
)
def test_override_errors_name_the_key_and_what_is_accepted(text, said):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [text])
    for words in [text, *said]:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"engine = 3", "expected a table"),
        (b"[engine]\nmax_seqs = 'x'", "engine.max_seqs = 'x'"),
        (b"[engine", "not a TOML file"),
        (b"\xff\xfe", "not a TOML file"),
        (b"[engine]\nfoo = 1", "no setting engine.foo"),
    ],
)
def test_file_errors_name_the_file(tmp_path, content, said):
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(file) in str(caught.value) and said in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read"):
            load_config(path)


def test_construction_is_checked_too():
    with pytest.raises(ConfigError, match=r"engine\.decode_steps = 0"):
        EngineSettings(decode_steps=0)
    with pytest.raises(ConfigError, match=r"cache\.pages = 1"):
        CacheSettings(pages=1)


def test_memory_forms():
    assert parse_memory("8GiB") == 8 * 2**30 and parse_memory("500 MB") == 500 * 10**6
    assert parse_memory(0.25) == 0.25 and parse_memory(2**30) == 2**30
    share = parse_memory(1)  # as TOML and --set spell it
    assert share == 1 and isinstance(share, float)
    assert load_config(None, ["cache.memory=1"]).cache.memory == 1
    for wrong in ("1", 2, 0, 1.5, True):
        with pytest.raises(ConfigError, match=r"cache\.memory"):
            CacheSettings(memory=wrong)


def test_fingerprint_follows_only_settings_that_change_answers():
    base = Settings()
    same = load_config(
        None, ["engine.max_seqs=2", "cache.prefix_sharing=false", "batch.order=input", "model.path=x"]
    )
    other = dataclasses.replace(base, engine=EngineSettings(seed=1))
    assert base.answers_fingerprint == same.answers_fingerprint != other.answers_fingerprint
