"""The batch command under the policy "blend": the same rows, and a resumed run plans what is left."""

import json

import numpy as np
import pytest

from jaxinfer.batch.cli import main
from jaxinfer.batch.kept import Lengths
from jaxinfer.llm import LLM


def rows(count):
    draw = np.random.default_rng(0)
    shared = [[int(t) for t in draw.integers(3, 200, 40)] for _ in range(2)]
    for index in range(count):
        own = [int(t) for t in draw.integers(3, 200, 6)]
        prompt, limit = (shared[index % 2] + own, 2) if index % 3 else (own, 24)
        body = {"prompt": prompt, "max_tokens": limit, "temperature": 0, "ignore_eos": index % 4 == 0}
        yield {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body}
    yield {"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"prompt": 5}}


def answer(tmp_path, policy, *options):
    out = tmp_path / f"{policy}.jsonl"
    sets = [f"schedule.policy={policy}", "model.dtype=float32", "engine.max_seqs=4", *options]
    flags = [part for text in sets for part in ("--set", text)]
    status = main(["-i", str(tmp_path / "in.jsonl"), "-o", str(out), "--quiet", *flags])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {line["custom_id"]: line["response"] and line["response"]["body"]["choices"] for line in lines}
    assert len(found) == len(lines) and status == 1
    return found


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(24)))
    return tmp_path


def test_a_blended_file_has_the_same_rows_and_resumes(source):
    whole = answer(source, "blend")
    assert whole == answer(source, "fcfs") and len(whole) == 25
    lines = (source / "blend.jsonl").read_text().splitlines(keepends=True)
    (source / "blend.jsonl").write_text("".join(lines[:9]))
    assert answer(source, "blend") == whole


def test_a_resumed_plan_knows_how_long_the_answers_of_the_earlier_run_were(source, monkeypatch):
    whole = answer(source, "blend")
    lines = (source / "blend.jsonl").read_text().splitlines(keepends=True)
    kept = [json.loads(line) for line in lines[:9]]
    (source / "blend.jsonl").write_text("".join(lines[:9]))
    workloads, plan = [], LLM.blend
    monkeypatch.setattr(LLM, "blend", lambda llm, *given: workloads.append(given[0]) or plan(llm, *given))
    assert answer(source, "blend") == whole
    (workload,) = workloads
    lengths = [row["response"]["body"]["usage"]["completion_tokens"] for row in kept if row["response"]]
    assert sorted(workload.known[workload.known >= 0]) == sorted(lengths)
    assert np.count_nonzero(workload.known < 0) == len(lines) - len(kept)
    for index in np.flatnonzero(workload.known >= 0):
        assert workload.least[index] <= workload.known[index] <= workload.answer_limits[index]


def test_of_many_kept_answers_an_even_sample_is_known():
    lengths = Lengths(most=100)
    draw = np.random.default_rng(0)
    for index in range(20_000):
        lengths.add(draw.bytes(16), index)
    assert 25 < len(lengths.by_key) <= 100
    assert 6_000 < np.mean(list(lengths.by_key.values())) < 14_000
