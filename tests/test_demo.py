"""The embedded model answers its tasks, and the demo tells a good run from a bad one."""

import itertools
import json
import random

import pytest
from rich.console import Console

from jaxinfer import LLM, SamplingParams, demo
from jaxinfer.demo_tasks import ARROW, HEADER, TASKS, held_out, items

GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def batch():
    return demo.make_batch()


ORACLES = {
    "reverse": lambda word: "".join(reversed(word)),
    "upper": str.upper,
    "sort": lambda digits: " ".join(map(str, sorted(map(int, digits.split())))),
    "max": lambda digits: str(max(map(int, digits.split()))),
    "add": lambda sum_: str(sum(map(int, sum_.split("+")))),
    "count": lambda body: " ".join(
        str(n)
        for n in (range(1000) if body.endswith("up") else reversed(range(1000)))
        if n // 100 == int(body[0]) and (n - int(body[:3])) * (1 if body.endswith("up") else -1) >= 0
    ),
    "story": lambda body: next(
        body.split()[at] for word, at in (("Who", 0), ("What", 3), ("Where", 6)) if word in body
    ).strip("."),
}


@pytest.mark.parametrize("task", TASKS)
def test_answers_of_the_tasks_are_right(task):
    rng = random.Random(1)
    for unseen in (False, True):
        for item in itertools.islice(items(task, rng, unseen=unseen), 50):
            assert item.answer == ORACLES[task](item.question.removeprefix(f"{task}: "))
            assert held_out(item.question) == unseen


def test_embedded_model_answers_held_out_questions():
    rng = random.Random("a handful")
    asked = [next(items(task, rng, unseen=True)) for task in ("reverse", "upper", "sort", "max", "story") * 4]
    llm = LLM()
    completed = list(llm.generate([item.question + ARROW for item in asked], GREEDY))
    assert {out.finish_reason for out in completed} == {"stop"}
    right = sum(out.text == f" {item.answer}" for out, item in zip(completed, asked))
    assert right >= 17, [(item.line, out.text) for out, item in zip(completed, asked)]
    chats = [[{"role": "system", "content": HEADER}, {"role": "user", "content": i.question}] for i in asked]
    right = sum(out.text.strip() == i.answer for out, i in zip(llm.chat(chats, GREEDY), asked))
    assert right >= 17


def test_demo_ends_well(tmp_path, capsys):
    assert demo.main(["--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(task in said for task in TASKS)
    assert "bench/demo_model.py" in said
    answers = (tmp_path / "answers.jsonl").read_text().splitlines()
    errors = [json.loads(line)["custom_id"] for line in answers if json.loads(line)["error"]]
    assert len(answers) == len(demo.make_batch().lines)
    assert sorted(errors, key=str) == [None, "bad-length", "bad-temperature"]


def _rows(batch, answer=lambda item: item.answer):
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
    problems = _problems(batch, _rows(batch, lambda item: "7" if item.task == "sort" else item.answer))
    assert problems == ["sort: 0% right, less than 85%"]


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
