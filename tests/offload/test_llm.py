"""Real checkpoints whose experts are four times what the device may hold of them, by library and by batch command."""

import json

import numpy as np
import pytest

from convert.cli import main as convert_command
from convert.convert import convert
from jaxinfer import LLM, SamplingParams, load_config
from jaxinfer.batch.cli import main
from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models.manifest import read_manifest

from .engines import with_slots

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


# more at once than the pool holds, in chunks, with common beginnings, with chosen pages and rounded experts
EVERYTHING = (
    "engine.chunk=24",
    "engine.max_tokens_per_step=64",
    "engine.max_seqs=8",
    "cache.pages=32",
    "engine.max_context=256",
    "engine.layers=scan",
    "sparsity.token_budget=64",
    "sparsity.dense_layers=1",
    "offload.experts=int4",
    "model.dtype=float32",
)


@pytest.mark.parametrize(
    "policy", ["balanced", *(pytest.param(p, marks=SLOW) for p in ("fiddler", "stream", "host"))]
)
@pytest.mark.parametrize("name", ["embedded", "babyllama"])
def test_all_features_at_once(request, tmp_path, name, policy):
    folder = EMBEDDED_MODEL if name == "embedded" else request.getfixturevalue("babyllama")[0]
    config = read_manifest(folder).config
    count = sum(config.moe_layers) * config.moe.experts
    draw = np.random.default_rng(4)
    shared = draw.integers(3, config.vocab_size, 40).tolist()
    prompts = [
        shared * (number % 2) + draw.integers(3, config.vocab_size, draw.integers(1, 90)).tolist()
        for number in range(14)
    ]
    out = []
    for slots in (count, count // 4):
        settings = load_config(None, [*EVERYTHING, f"offload.folder={tmp_path}", f"offload.policy={policy}"])
        llm = LLM(folder, config=with_slots(config, settings, slots))
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
        out.append([tuple(answer.token_ids) for answer in answers])
        metrics = llm.metrics()
        assert metrics["preemptions"] > 0 and metrics["cached_tokens"] > 0
        assert (metrics["expert_hits"] == metrics["expert_visits"]) == (slots == count)
        llm.engine.offload.close()
    assert out[0] == out[1] and all(len(ids) == 24 for ids in out[0])


@pytest.fixture(scope="module")
def low_bit(shared_data, tmp_path_factory):
    """A checkpoint of the converter, rounded to nearest: that is quickest."""
    source, folder = (
        shared_data("checkpoints/babyllama105-moe"),
        tmp_path_factory.mktemp("converted") / "w4a16",
    )
    without_text = ("method=rtn", "weight_clip=1.0", "smooth_keys=false")
    chosen = [f"--set=quantization.{text}" for text in without_text]
    assert convert_command([str(source), str(folder), "--quant", "w4a16", *chosen]) == 0
    return folder


def test_experts_of_a_quantized_checkpoint(low_bit, tmp_path):
    """All on the device as the checkpoint has them, and as records: the same codes and scales, the same answers."""
    draw = np.random.default_rng(4)
    prompts = [draw.integers(3, 105, draw.integers(1, 90)).tolist() for _ in range(8)]
    sampling = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)] * 6
    sampling += [SamplingParams(temperature=0, max_tokens=8, beam_width=3, n=3)] * 2
    settings = load_config(None, ["engine.layers=scan", "cache.pages=120", f"offload.folder={tmp_path}"])
    out = []
    for slots in (None, 40, 10):
        config = read_manifest(low_bit).config
        llm = LLM(low_bit, config=settings if slots is None else with_slots(config, settings, slots))
        assert llm.engine.memory.expert_slots == slots
        answers = list(llm.generate(prompts, sampling))
        assert [answer.error for answer in answers] == [None] * 8
        out.append([[choice.token_ids for choice in answer.choices] for answer in answers])
    assert out[0] == out[1] == out[2]
    assert [len(choices) for choices in out[0]] == [1] * 6 + [3] * 2


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
