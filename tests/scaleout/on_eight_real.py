"""Converted models on a mesh, through the library call. `test_mesh.py` starts this file in a process that has eight simulated devices."""

import json
from pathlib import Path

import jax
import meshes
import numpy as np
import pytest
from on_eight_devices import check_even, check_exchanges

import jaxinfer
from convert.convert import convert
from convert.quantize import Quantize
from jaxinfer import LLM, SamplingParams, load_config

assert len(jax.devices()) == 8, "see test_mesh.py"
FAMILIES = Path(__file__).parents[1] / "data" / "families"
EMBEDDED = Path(jaxinfer.__file__).parent / "assets" / "hugging-face"
BASE = ("model.dtype=float32", "engine.max_seqs=4", "engine.max_tokens_per_step=64", "cache.memory=64MiB")
QUEST = ("sparsity.token_budget=32", "sparsity.dense_layers=1", "cache.page_size=8")
LLAMA_MESHES = "{tensor=2}", "{tensor=4}", "{tensor=8}"
MOE_MESHES = "{tensor=2}", "{expert=4}", "{tensor=4, expert=2}"


def answers(folder, prompts, tokens, *overrides: str) -> list[list[int]]:
    llm = LLM(folder, config=load_config(None, [*BASE, *overrides]))
    sampling = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in tokens]
    found = list(llm.generate(prompts, sampling))
    assert not [out.error for out in found if out.error]
    llm.engine.check_integrity()
    return [list(out.token_ids) for out in found]


def random_prompts(vocabulary: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(1, vocabulary, length).tolist() for length in (40, 3, 90, 17)]


def compare(folder, meshes, prompts, *overrides: str) -> None:
    tokens = [24] * len(prompts)
    alone = answers(folder, prompts, tokens, *overrides)
    for mesh in meshes:
        assert answers(folder, prompts, tokens, f"engine.mesh={mesh}", *overrides) == alone, mesh


@pytest.mark.parametrize("name", ["stories260K", "babyllama105", "babyllama105-moe"])
def test_golden_checkpoints_answer_as_transformers_does(name, shared_data, tmp_path):
    source = shared_data(f"checkpoints/{name}")
    convert(source, tmp_path / name)
    cases = json.loads((source / "reference.json").read_text())["cases"]
    expected = [case["greedy_ids"] for case in cases]
    prompts = [case["prompt_ids"] for case in cases]
    for mesh in MOE_MESHES if name.endswith("moe") else LLAMA_MESHES:
        found = answers(tmp_path / name, prompts, map(len, expected), f"engine.mesh={mesh}")
        assert found == expected, mesh
    compare(tmp_path / name, ["{tensor=4}"], prompts[:4], *QUEST)


@pytest.mark.parametrize("name", ["babyllama105", "babyllama105-moe"])
def test_packed_checkpoints(name, shared_data, tmp_path):
    text = shared_data("text/tinystories_197k.txt")
    chosen = {"samples": 4, "length": 128}
    quantize = Quantize("atom-w4a8", chosen, text)
    convert(shared_data(f"checkpoints/{name}"), tmp_path / name, quantize=quantize)
    prompts = random_prompts(100)
    for overrides in ((), QUEST):
        compare(tmp_path / name, MOE_MESHES if name.endswith("moe") else LLAMA_MESHES, prompts, *overrides)


@pytest.mark.parametrize("mode", ["", "atom-w4a8"])
def test_the_embedded_model(mode, tmp_path):
    folder = None
    if mode:
        text = tmp_path / "text.txt"
        text.write_text((EMBEDDED.parent / "demo" / "requests.jsonl").read_text())
        folder = tmp_path / "packed"
        convert(EMBEDDED, folder, quantize=Quantize(mode, {"samples": 4, "length": 128}, text))
    for overrides in ((), QUEST, (*QUEST, "cache.dtype=int4")):
        compare(folder, MOE_MESHES, random_prompts(2048), *overrides)


@pytest.mark.parametrize("quest", [(), QUEST], ids=["dense", "quest"])
def test_the_embedded_model_is_split_evenly_and_exchanges_nothing_but_activations(quest):
    given = ("model.dtype=float32", "cache.pages=40", *meshes.BASE, *quest)
    alone = LLM(config=load_config(None, given)).engine
    for mesh, devices in (("{tensor=2}", 2), ("{expert=2}", 2), ("{tensor=4, expert=2}", 8)):
        engine = LLM(config=load_config(None, [*given, f"engine.mesh={mesh}"])).engine
        check_exchanges(engine, packed=False)
        check_even(engine, alone)
        if devices == 2:  # it has 2 KV heads: more devices hold them several times
            assert engine.memory.weight_bytes <= 1.05 * alone.memory.weight_bytes / devices


@pytest.mark.parametrize(
    "case",
    ["llama_biases", "llama_mqa", "llama_tied", "mistral", "mixtral_window", "olmoe", "phi3", "phi3_partial"]
    + ["phimoe", "qwen2_window", "qwen3", "qwen3_moe", "qwen3_moe_mixed"],
)
def test_families(case, tmp_path):
    convert(FAMILIES / case, tmp_path / case, dtype="float32")
    short = ("engine.max_context=64", "engine.max_tokens_per_step=16")
    prompts = [prompt[:16] for prompt in random_prompts(64)]
    compare(
        tmp_path / case,
        ["{tensor=2}"] if case == "phi3_partial" else ["{tensor=2}", "{tensor=4}"],
        prompts,
        *short,
    )
