"""Beam search on whole checkpoints, against transformers' own (tests/data/make_beams.py)."""

import json
from pathlib import Path

import pytest

from convert.convert import convert
from jaxinfer import LLM, SamplingParams, load_config

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "beams.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_answers_are_those_of_transformers(name, shared_data, tmp_path):
    cases = GOLDEN[name]
    folder = DATA / name if name.startswith("families/") else shared_data(name)
    convert(folder, tmp_path / "model")
    settings = [
        "engine.max_seqs=5",
        "engine.max_tokens_per_step=16",
        "cache.page_size=8",
        "engine.layers=scan",
    ]
    llm = LLM(tmp_path / "model", config=load_config(None, settings))
    sampling = [
        SamplingParams(
            beam_width=case["width"],
            n=case["width"],
            temperature=0,
            max_tokens=case["max_new_tokens"],
            min_tokens=case["min_tokens"],
            stop_token_ids=case["stops"],
            ignore_eos=True,
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
            logprobs=0,
        )
        for case in cases
    ]
    outs = llm.generate([case["prompt"] for case in cases], sampling)
    for case, out in zip(cases, outs, strict=True):
        assert [list(choice.token_ids) for choice in out.choices] == case["ids"], case
        for choice, score in zip(out.choices, case["scores"], strict=True):
            total = sum(entry.logprob for entry in choice.logprobs)
            assert total / len(choice.token_ids) ** case["length_penalty"] == pytest.approx(
                score, rel=1e-4, abs=1e-5
            )
    llm.engine.check_integrity()
