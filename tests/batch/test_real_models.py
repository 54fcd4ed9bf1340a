"""The batch command on a real checkpoint: mixed, shared and bad rows, and prompts that people wrote."""

import json
import random

import numpy as np
import pytest

from convert.convert import convert
from jaxinfer import LLM, Request, SamplingParams, load_config
from jaxinfer.batch.cli import main

CONTEXT = 512
BAD_ROWS = (
    "{not json",
    b"\xff\xfe",
    '{"custom_id": "b%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": 5}}',
    '{"custom_id": "b%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": []}}',
    '{"custom_id": "b%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "n": 0}}',
    '{"custom_id": "b%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "temperature": -1}}',
    '{"custom_id": "b%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 600}}',
    '{"custom_id": "b%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 9999]}}',
    '{"custom_id": "b%d", "method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}}',
    '{"custom_id": "b%d", "method": "POST", "url": "/v1/unknown", "body": {"prompt": "x"}}',
)


@pytest.fixture(scope="module")
def model(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "stories260K"
    convert(shared_data("checkpoints/stories260K"), folder)
    return folder


def run(tmp_path, lines, *options, load_model=None):
    """Answers lines of text or bytes; returns (exit status, output rows)."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    )
    status = main(["-i", str(source), "-o", str(out), "--quiet", *options], load_model=load_model)
    return status, [json.loads(line) for line in out.read_text().splitlines()]


def row(name, **body):
    request = {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"temperature": 0} | body,
    }
    return json.dumps(request)


def mixed_prompts(count: int) -> dict[str, tuple[list[int], int]]:
    """Prompts of 1-400 tokens, four in ten with a shared prefix, and lengths of 1-200 tokens to generate."""
    draw = random.Random(11)

    def tokens(low, high):
        return [draw.randrange(3, 512) for _ in range(draw.randint(low, high))]

    prefixes = [tokens(60, 300) for _ in range(5)]
    prompts = {}
    for index in range(count):
        prompt = draw.choice(prefixes) + tokens(1, 100) if draw.random() < 0.4 else tokens(1, 400)
        prompts[f"g{index}"] = (prompt, min(draw.randint(1, 200), CONTEXT - len(prompt)))
    return prompts


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 30])
def test_a_thousand_mixed_rows_answer_as_one_by_one(tmp_path, model, every):
    """Compares `every`-th good row; doing them one by one takes longest."""
    prompts = mixed_prompts(900)
    lines = [
        row(name, prompt=prompt, max_tokens=answer, ignore_eos=True)
        for name, (prompt, answer) in prompts.items()
    ]
    bad = [BAD_ROWS[i % len(BAD_ROWS)] for i in range(100)]
    lines += [line if isinstance(line, bytes) else line.replace("%d", str(i)) for i, line in enumerate(bad)]
    random.Random(3).shuffle(lines)
    llm = LLM(model)
    llm.warm_up()
    warm = llm.metrics()["compilations"]
    status, rows = run(tmp_path, lines, load_model=lambda settings: llm)
    assert status == 1 and len(rows) == 1000
    assert llm.metrics()["compilations"] == warm
    llm.engine.check_integrity()
    assert llm.metrics()["cached_tokens"] > 20_000

    alone = LLM(model, config=load_config(None, ["engine.max_seqs=1", "cache.prefix_sharing=false"]))
    one_by_one = {
        out.request_id: out
        for out in alone.stream(
            Request(
                id=name,
                prompt_ids=np.asarray(prompt, np.int32),
                sampling=SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True),
            )
            for name, (prompt, answer) in list(prompts.items())[::every]
        )
    }
    answered = {r["custom_id"]: r["response"]["body"] for r in rows if not r["error"]}
    assert answered.keys() == prompts.keys()
    for name, body in answered.items():
        assert name not in one_by_one or body["choices"][0]["text"] == one_by_one[name].text, name
        assert body["usage"]["prompt_tokens"] == len(prompts[name][0])
        assert body["usage"]["completion_tokens"] == prompts[name][1]
        assert body["choices"][0]["finish_reason"] == "length"
    assert sum(1 for r in rows if r["error"]) == 100
    assert all(r["error"]["line"] and r["error"]["message"] for r in rows if r["error"])


def test_grade_school_math_and_multi_turn_prompts(tmp_path, model, shared_data):
    questions = [json.loads(line)["question"] for line in shared_data("prompts/gsm8k_test.jsonl").open()][
        :150
    ]
    turns = [json.loads(line)["turns"][0] for line in shared_data("prompts/mt_bench.jsonl").open()]
    tokenizer = LLM(model).tokenizer
    lines, lengths = [], {}
    for index, text in enumerate(questions + turns):
        name = f"r{index}"
        if index < len(questions):
            lines.append(row(name, prompt=text, max_tokens=24))
            lengths[name] = len(tokenizer.encode(text))
        else:
            messages = [{"role": "user", "content": text}]
            body = {"messages": messages, "max_tokens": 24, "temperature": 0}
            request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.append(json.dumps(request))
            lengths[name] = len(tokenizer.chat(messages))
    status, rows = run(tmp_path, lines, "--model", str(model))
    assert {r["custom_id"] for r in rows} == lengths.keys()
    for r in rows:
        prompt = lengths[r["custom_id"]]
        if prompt + 24 > CONTEXT:
            assert r["error"]["code"] == "context_length_exceeded" and str(CONTEXT) in r["error"]["message"]
            continue
        body = r["response"]["body"]
        usage, reason = body["usage"], body["choices"][0]["finish_reason"]
        assert usage["prompt_tokens"] == prompt
        assert usage["total_tokens"] == prompt + usage["completion_tokens"]
        assert (reason, usage["completion_tokens"] == 24) in (
            ("length", True),
            ("stop", False),
            ("stop", True),
        )
    assert status == (1 if any(length + 24 > CONTEXT for length in lengths.values()) else 0)


def test_rows_of_beam_search_beside_others_and_after_a_resume(model, tmp_path):
    prompts = ["Once upon a time", "The cat", "Tom and Sue went to the park.", "Ben liked"]
    asked = [
        {"beam_width": 4, "n": 2, "length_penalty": 0.5},
        {},
        {"use_beam_search": True, "best_of": 3, "early_stopping": True, "logprobs": 2},
        {"use_beam_search": True, "n": 2},
    ]
    lines = [
        row(f"r{i}", prompt=p, max_tokens=12, **fields)
        for i, (p, fields) in enumerate(zip(prompts, asked, strict=True))
    ]
    lines.append(row("wide", prompt="x", beam_width=9, max_tokens=4))
    settings = ["engine.max_seqs=8", "engine.max_tokens_per_step=16"]
    options = ["--model", str(model), *(word for each in settings for word in ("--set", each))]
    status, rows = run(tmp_path, lines, *options)
    assert status == 1
    found = {each["custom_id"]: each for each in rows}
    assert "at most engine.max_seqs" in found.pop("wide")["error"]["message"]
    llm = LLM(model, config=load_config(None, settings))
    sampling = [
        SamplingParams(temperature=0, max_tokens=12, beam_width=4, n=2, length_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=0, max_tokens=12, beam_width=3, early_stopping=True, logprobs=2),
        SamplingParams(temperature=0, max_tokens=12, beam_width=2, n=2),
    ]
    for index, out in enumerate(llm.generate(prompts, sampling)):
        body = found[f"r{index}"]["response"]["body"]
        assert [choice["text"] for choice in body["choices"]] == [choice.text for choice in out.choices]
        assert body["usage"]["completion_tokens"] == out.usage.completion_tokens
    body = found["r2"]["response"]["body"]
    assert len(body["choices"][0]["logprobs"]["tokens"]) == body["usage"]["completion_tokens"]
    out = tmp_path / "out.jsonl"
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:2]))
    _, again = run(tmp_path, lines, *options)
    choices = {each["custom_id"]: each["response"]["body"]["choices"] for each in again if each["response"]}
    assert choices == {name: each["response"]["body"]["choices"] for name, each in found.items()}
