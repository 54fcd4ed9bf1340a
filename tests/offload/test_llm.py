"""Real checkpoints whose experts are four times what the device may hold of them, by library and by batch command."""

import json

import pytest

from convert.convert import convert
from jaxinfer import LLM, SamplingParams, load_config
from jaxinfer.batch.cli import main

SLOW = pytest.mark.slow
# 40 experts of 540,672 bytes; the budget holds about ten beside the rest
MOE = ("offload.device_memory=9100KB", "cache.pages=60", "engine.max_seqs=8", "engine.max_tokens_per_step=32")


@pytest.fixture(scope="module")
def babyllama(shared_data, tmp_path_factory):
    source = shared_data("checkpoints/babyllama105-moe")
    folder = tmp_path_factory.mktemp("converted") / "moe"
    convert(source, folder)
    return folder, json.loads((source / "reference.json").read_text())["cases"]


@pytest.mark.parametrize(
    "policy", ["fiddler", pytest.param("host", marks=SLOW), pytest.param("stream", marks=SLOW)]
)
def test_greedy_answers_equal_transformers(babyllama, tmp_path, policy):
    folder, cases = babyllama
    llm = LLM(
        folder,
        config=load_config(
            None, [*MOE, "engine.layers=scan", f"offload.folder={tmp_path}", f"offload.policy={policy}"]
        ),
    )
    held, every = llm.engine.memory.expert_slots, 40
    assert 1 < held <= every / 4
    sampling = [
        SamplingParams(temperature=0, max_tokens=len(c["greedy_ids"]), ignore_eos=True) for c in cases
    ]
    out = llm.generate([case["prompt_ids"] for case in cases], sampling)
    assert [list(completion.token_ids) for completion in out] == [case["greedy_ids"] for case in cases]
    assert llm.metrics()["expert_visits"] > 0
    llm.engine.offload.close()


def test_the_batch_command_with_experts_on_the_host(tmp_path):
    prompts = ["Once upon a time", "The pass key is 12345. What is the pass key?", "One day, a dog", "The"]
    rows = [
        {
            "custom_id": str(index),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0},
        }
        for index, prompt in enumerate(prompts * 4)
    ]
    source, texts = tmp_path / "in.jsonl", []
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "model.dtype=float32",
        "engine.layers=scan",
        "cache.pages=40",
        "engine.max_context=256",
        "engine.max_seqs=8",
    ]
    common += ["engine.max_tokens_per_step=64"]
    # 48 experts of 196,608 bytes
    offload = ["offload.device_memory=11500KB", f"offload.folder={tmp_path / 'experts'}"]
    for name, extra in (("whole", []), ("split", offload)):
        settings = [word for text in [*common, *extra] for word in ("--set", text)]
        assert main(["-i", str(source), "-o", str(tmp_path / name), "--quiet", *settings]) == 0
        answers = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        texts.append({a["custom_id"]: a["response"]["body"]["choices"][0]["text"] for a in answers})
    assert texts[0] == texts[1] and len(texts[0]) == 16
