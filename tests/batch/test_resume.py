"""Nothing is lost and nothing is done twice: torn outputs, full disks, foreign files."""

import errno
import json
import os
import random

import pytest

from jaxinfer.batch import journal
from jaxinfer.errors import EngineError, RequestError

from .fake import FakeLLM, completion
from .test_command import by_id, read_rows, run, write_rows

FIXED = ("--quiet", "--set", "batch.created=1")


@pytest.fixture
def finished(tmp_path):
    """(input, output bytes) of a small finished run with answers and error rows."""
    rows = [
        completion("a"),
        b"bad",
        completion("b", "h\N{SNOWMAN}"),
        completion("c", n=0),
        completion("a"),
        completion("d"),
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert run("-i", source, "-o", tmp_path / "whole", *FIXED) == 1
    return source, (tmp_path / "whole").read_bytes()


def test_cut_at_any_byte_it_goes_on_to_the_same_rows(tmp_path, finished, monkeypatch):
    source, whole = finished
    monkeypatch.setattr(journal.os, "fsync", lambda descriptor: None)  # thousands of runs
    out = tmp_path / "out"
    expected = sorted(whole.splitlines())
    last = whole.rindex(b"\n", 0, -1) - 1
    for length in [*range(60), *range(60, last, 7), *range(last, len(whole) + 1)]:
        out.write_bytes(whole[:length])
        model = FakeLLM()
        assert run("-i", source, "-o", out, *FIXED, model=model) == 1
        lines = out.read_bytes().splitlines()
        assert sorted(lines) == expected, length
        survived = [line for line in whole[:length].splitlines() if line in expected]
        assert lines[: len(survived)] == survived
        kept_answers = sum(b'"error":null' in line for line in survived)
        assert len(model.served) == 3 - kept_answers


def test_a_tail_of_zeros_is_a_torn_tail(tmp_path, finished):
    source, whole = finished
    (tmp_path / "out").write_bytes(whole[: whole.index(b"\n") + 1] + bytes(4096))
    assert run("-i", source, "-o", tmp_path / "out", *FIXED) == 1
    assert sorted((tmp_path / "out").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_random_cuts_of_a_longer_run_each_resumed_and_cut_again(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [completion(f"r{i}", f"text {i}") for i in range(300)])
    out = tmp_path / "out"
    dice = random.Random(3)
    served = 0
    for _ in range(20):
        model = FakeLLM(fail_after=(dice.randrange(40), EngineError("killed")))
        assert run("-i", source, "-o", out, *FIXED, model=model) in (0, 2)
        served += len(model.served)
        size = out.stat().st_size
        os.truncate(out, size - dice.randrange(min(size, 60) + 1))
    last = FakeLLM()
    assert run("-i", source, "-o", out, *FIXED, model=last) == 0
    assert by_id(out).keys() == {f"r{i}" for i in range(300)}
    assert served + len(last.served) <= 300 + 20 * (8 + 1)  # what was in flight, and one torn row, each time
    assert run("-i", source, "-o", tmp_path / "whole", *FIXED) == 0
    assert by_id(out) == by_id(tmp_path / "whole")


def foreign_outputs(whole):
    other = whole.replace(b'"id":"batch_req_', b'"id":"batch_req_' + b"0" * 8)
    first = whole.splitlines(keepends=True)[0]
    return {
        "text": b"my notes\nare here\n",
        "text without newline": b"my notes",
        "json": b'{"a": 1}\n',
        "json without newline": b'{"a": 1}',
        "rows with other ids": other,
        "a row twice": first + first,
        "damage in the middle": first[:40] + b"\n" + whole,
        "the input itself": b'{"custom_id": "a", "method": "POST"}\n',
    }


@pytest.mark.parametrize("name", foreign_outputs(b"x\n"))
def test_an_output_that_is_not_ours_is_not_touched(tmp_path, finished, capsys, name):
    source, whole = finished
    out = tmp_path / "out"
    content = foreign_outputs(whole)[name]
    out.write_bytes(content)
    os.utime(out, (1, 1))
    model = FakeLLM()
    assert run("-i", source, "-o", out, *FIXED, model=model) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == content and out.stat().st_mtime == 1 and model.served == []
    assert run("-i", source, "-o", out, "--overwrite", *FIXED) == 1
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize("change", ["model", "settings", "another row", "fewer rows"])
def test_another_model_input_or_setting_exits_2(tmp_path, finished, capsys, change):
    source, whole = finished
    out = tmp_path / "out"
    out.write_bytes(whole)
    extra = ["--set", "engine.seed=5"] if change == "settings" else []
    model = FakeLLM(fingerprint="model-b") if change == "model" else FakeLLM()
    lines = source.read_bytes().splitlines(keepends=True)
    if change == "another row":
        source.write_bytes(b"".join([*lines[:-1], lines[-1].replace(b"hello", b"hallo")]))
    if change == "fewer rows":
        source.write_bytes(b"".join(lines[:-1]))
    assert run("-i", source, "-o", out, *FIXED, *extra, model=model) == 2
    said = capsys.readouterr().err
    assert (
        "another model or other settings" if change in ("model", "settings") else "1 of its 6 rows"
    ) in said
    assert out.read_bytes() == whole and model.served == []


def test_more_rows_and_settings_that_change_no_answer_go_on(tmp_path, finished):
    source, whole = finished
    out = tmp_path / "out"
    out.write_bytes(whole)
    with source.open("ab") as file:
        file.write(json.dumps(completion("e")).encode() + b"\n")
    model = FakeLLM()
    assert run("-i", source, "-o", out, *FIXED, "--set", "engine.max_seqs=2", model=model) == 1
    assert model.served == ["e"] and out.read_bytes().startswith(whole)


class Moody(FakeLLM):
    """Fails with errors that are not the row's own, and with one that is."""

    CODES = {"r1": "engine_failure", "r2": "context_length_exceeded", "r3": "kv_pool_exceeded"}  # noqa: RUF012

    def _complete(self, request):
        answer = super()._complete(request)
        code = self.CODES.get(request.id)
        error = RequestError(code, "for a test") if code else None
        return type(answer)(request_id=request.id, error=error) if error else answer


def test_errors_of_the_engine_are_tried_again_and_errors_of_the_row_are_not(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [b"bad", *[completion(f"r{i}") for i in range(5)]])
    out = tmp_path / "out"
    assert run("-i", source, "-o", out, *FIXED, model=Moody()) == 1
    os.chmod(out, 0o640)
    again = FakeLLM()
    assert run("-i", source, "-o", out, *FIXED, model=again) == 1
    assert sorted(again.served) == ["r1", "r3"]
    codes = sorted(row["error"]["code"] for row in by_id(out).values() if row["error"])
    assert codes == ["context_length_exceeded", "invalid_json"]
    assert out.stat().st_mode & 0o777 == 0o640 and len(list(tmp_path.iterdir())) == 2
    before = out.stat()
    assert run("-i", source, "-o", out, *FIXED) == 1
    assert out.stat().st_ino == before.st_ino  # nothing to retry: the file is not written anew


@pytest.mark.parametrize("model", [FakeLLM, Moody])
def test_what_is_tried_again_keeps_the_order_of_the_input(tmp_path, model):
    source = write_rows(tmp_path / "in.jsonl", [b"bad", *[completion(f"r{i}") for i in range(20)]])
    out, ordered = tmp_path / "out", (*FIXED, "--order", "input")
    assert run("-i", source, "-o", out, *ordered, model=Moody()) == 1
    last = model()
    assert run("-i", source, "-o", out, *ordered, model=last) == 1
    assert [row["custom_id"] for row in read_rows(out)] == [None, *[f"r{i}" for i in range(20)]]
    assert last.served == [f"r{i}" for i in range(1, 20)]


def test_two_runs_cannot_write_one_output(tmp_path, finished, capsys):
    source, whole = finished
    out = tmp_path / "out"
    out.write_bytes(whole)
    first = journal.OutputFile(str(out), overwrite=False)
    assert run("-i", source, "-o", out, *FIXED) == 2
    assert "another run is writing" in capsys.readouterr().err and out.read_bytes() == whole
    first.close()


@pytest.mark.parametrize("room", [0, 1000, 5000, 20_000])
def test_a_full_disk(tmp_path, monkeypatch, capsys, room):
    source = write_rows(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(200)])
    out = tmp_path / "out"
    write = os.write

    def limited(descriptor, data):
        left = room - os.fstat(descriptor).st_size
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:left])

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", limited)
        # A piece of the file at a time, as a slow engine would give it.
        assert run("-i", source, "-o", out, *FIXED, "--set", "batch.flush_seconds=0") == 130
    said = capsys.readouterr().err
    assert "the disk is full" in said and "goes on from there" in said
    assert out.stat().st_size <= room and out.read_bytes()[-1:] in (b"", b"\n")
    model = FakeLLM()
    kept = len(read_rows(out))
    assert run("-i", source, "-o", out, *FIXED, model=model) == 0
    assert len(by_id(out)) == 200 and len(model.served) == 200 - kept


def test_an_engine_that_fails_leaves_what_is_finished(tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(50)])
    for failure, said in [
        (EngineError("the device failed"), "the device failed"),
        (MemoryError(), "out of memory"),
        (ZeroDivisionError("bug"), "internal error: ZeroDivisionError: bug"),
    ]:
        out = tmp_path / f"out-{type(failure).__name__}"
        model = FakeLLM(fail_after=(20, failure))
        assert run("-i", source, "-o", out, *FIXED, model=model) == 2
        assert said in capsys.readouterr().err and len(by_id(out)) == 20 and model.closed
        assert run("-i", source, "-o", out, *FIXED) == 0
        assert len(by_id(out)) == 50


def test_an_engine_that_forgets_a_request_gets_an_error_row(tmp_path):
    class Forgetful(FakeLLM):
        def stream(self, requests):
            return (answer for answer in super().stream(requests) if answer.request_id != "r2")

    source = write_rows(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(4)])
    assert run("-i", source, "-o", tmp_path / "out", *FIXED, model=Forgetful()) == 1
    assert by_id(tmp_path / "out")["r2"]["error"]["code"] == "engine_failure"
