"""A profile of a text places experts so that the same text finds as many as the profile says."""

import json

import numpy as np
import pytest

from jaxinfer import LLM, load_config
from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models.manifest import read_manifest
from jaxinfer.offload.placement import by_popularity, hit_rate, read_popularity
from jaxinfer.popularity import count_visits, main

from .engines import with_slots

TEXT = (
    "This is the story of Dir and Pifla. Dir had a small house near the school. For 65 coins Fokeg bought a hat. "
    * 9
)
SETTINGS = (
    "model.dtype=float32",
    "engine.layers=scan",
    "engine.max_seqs=4",
    "cache.pages=40",
    "engine.max_context=256",
)


def sets(folder, slots, *more):
    """Settings under which the embedded model has so many slots, as texts."""
    texts = [*SETTINGS, f"offload.folder={folder}", "offload.policy=host", "offload.adaptive=false", *more]
    planned = with_slots(read_manifest(EMBEDDED_MODEL).config, load_config(None, texts), slots)
    return [*texts, f"offload.device_memory={planned.offload.device_memory}"]


def test_counts_are_what_the_placement_then_finds(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "popularity.json"
    text.write_text(TEXT)
    words = [f"--set={each}" for each in sets(tmp_path, 9, "engine.max_tokens_per_step=64")]
    assert main([str(text), "-o", str(out), *words]) == 0
    assert "tokens" in capsys.readouterr().out
    (entry,) = json.loads(out.read_text())["texts"].values()
    counts = np.array(entry["counts"])
    assert (counts.sum(axis=1) == 2 * entry["tokens"]).all() and counts.shape == (6, 8)

    # another budget, other steps, placed by the profile: the same counts, and as many hits as they promise
    llm = LLM(
        config=load_config(
            None, sets(tmp_path, 14, f"offload.popularity={out}", "engine.max_tokens_per_step=32")
        )
    )
    again, tokens = count_visits(llm, TEXT)
    np.testing.assert_array_equal(again, counts)
    assert tokens == entry["tokens"]
    shares = read_popularity(out, 6, 8)
    metrics, placed = llm.metrics(), by_popularity(shares, 14 - llm.settings.offload.landing_slots)
    assert metrics["expert_hits"] / metrics["expert_visits"] == pytest.approx(hit_rate(counts, placed))
    assert hit_rate(counts, placed) > 1.1 * placed.mean()
    llm.engine.offload.close()


@pytest.mark.parametrize(
    "content, more, said",
    [
        ("A text.", [], "offload.device_memory is not set"),
        (" \n", [], "text.txt: is empty"),
        (b"\xff\xfe\xff", [], "cannot be read as text"),
        (None, [], "cannot be read as text"),
        ("A text.", ["--model", "nowhere"], "nowhere"),
        ("A text.", ["--set=offload.nothing=1"], "offload.nothing"),
    ],
)
def test_what_cannot_be_profiled_is_named(tmp_path, capsys, content, more, said):
    text, out = tmp_path / "text.txt", tmp_path / "popularity.json"
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(text), "-o", str(out), *more]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
