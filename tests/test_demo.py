"""The embedded model answers its tasks, and the demo tells a good run from a bad one."""

import json

import pytest
from rich.console import Console

from jaxinfer import LLM, SamplingParams, demo
from jaxinfer.batch.rows import CHAT_URL


@pytest.fixture(scope="module")
def batch():
    return demo.make_batch()


def test_rows_are_mixed(batch):
    rows = [json.loads(line) for line in batch.lines if line.endswith("}")]
    assert 150 <= len(rows) <= 250
    assert {row["url"] == CHAT_URL for row in rows} == {True, False}
    assert {"passkey", "lines", "story", "needles", "table", "classify", "tell"} == set(batch.tasks)
    assert max(len(line) for line in batch.lines) > 20_000  # long documents


def test_embedded_model_answers():
    found = "The grass is green. The pass key is 40961. Remember it. 40961 is the pass key.\nThe sky is blue."
    asked = f"{found}\nWhat is the pass key? The pass key is"
    (out,) = LLM().generate([asked], SamplingParams(temperature=0, max_tokens=12))
    assert out.text == " 40961." and out.finish_reason == "stop"


def test_demo_ends_well(tmp_path, capsys):
    assert demo.main(["--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(task in said for task in demo.PASS)
    answers = (tmp_path / "answers.jsonl").read_text().splitlines()
    errors = [json.loads(line)["custom_id"] for line in answers if json.loads(line)["error"]]
    assert len(answers) == len(demo.make_batch().lines)
    assert sorted(errors, key=str) == [None, "bad-length", "bad-temperature"]


def _rows(batch, answer=lambda item: item.answer or "Then they all went home, tired and happy."):
    told = [
        {"custom_id": key, "response": {"body": {"choices": [{"text": answer(item)}]}}, "error": None}
        for key, item in batch.expected.items()
    ]
    wrong = [
        {"custom_id": key or None, "response": None, "error": {"code": code, "message": "no"}}
        for key, code in batch.broken.items()
    ]
    return told + wrong


def _problems(batch, rows):
    return demo.check(batch, rows, Console(quiet=True))


def test_check_accepts_right_answers(batch):
    assert _problems(batch, _rows(batch)) == []


def test_check_notices_wrong_answers(batch):
    problems = _problems(
        batch, _rows(batch, lambda item: "7" if item.task == "lines" else item.answer or "x" * 40)
    )
    assert problems == [f"lines: 0% right, less than {demo.PASS['lines']:.0%}"]


def test_check_notices_missing_rows(batch):
    assert "1 rows are missing" in _problems(batch, _rows(batch)[1:])


def test_check_notices_a_bad_row_that_was_answered(batch):
    rows = _rows(batch)
    rows[-1]["error"] = None
    assert _problems(batch, rows) == ["the torn row: should be an error row"]


def test_check_notices_an_error_that_should_not_be(batch):
    rows = _rows(batch)
    rows[0]["error"] = {"code": "boom", "message": "no"}
    assert f"{rows[0]['custom_id']}: unexpected error boom" in _problems(batch, rows)
