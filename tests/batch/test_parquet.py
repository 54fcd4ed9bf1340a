"""Parquet in and out: the same rows as JSON lines."""

import json

import pytest

from .fake import FakeLLM, chat, completion
from .test_command import read_rows, run, write_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write_parquet(path, rows, *, struct=False):
    rows = [row if struct else row | {"body": json.dumps(row["body"])} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=64)
    return path


def read_parquet(path):
    rows = parquet.read_table(path).to_pylist()
    return [
        row | {name: row[name] and json.loads(row[name]) for name in ("response", "error")} for row in rows
    ]


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_gives_the_answers_of_json_lines(tmp_path, struct):
    rows = [
        chat("a", "h\N{SNOWMAN}"),
        *[completion(f"r{i}", seed=i) for i in range(300)],
        completion("bad", n=0),
    ]
    fixed = ["--set", "batch.created=1", "--order", "input", "--quiet"]
    assert run("-i", write_rows(tmp_path / "in.jsonl", rows), "-o", tmp_path / "out.jsonl", *fixed) == 1
    source = write_parquet(tmp_path / "in.parquet", rows, struct=struct)
    out = tmp_path / "out.parquet"
    assert run("-i", source, "-o", out, *fixed) == 1
    ours, theirs = read_parquet(out), read_rows(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in ours] == [row["custom_id"] for row in theirs]

    def answers(rows):
        return [
            row["response"]["body"]["choices"] if row["response"] else row["error"]["code"] for row in rows
        ]

    assert answers(ours) == answers(theirs)
    model = FakeLLM()
    assert run("-i", source, "-o", out, *fixed, model=model) == 1 and model.served == []
    assert read_parquet(out) == ours


def test_a_parquet_output_that_cannot_be_written_is_a_failure_that_can_be_mended(tmp_path, capsys):
    source, out = write_rows(tmp_path / "in.jsonl", [completion("a")]), tmp_path / "out.parquet"

    class Blocker(FakeLLM):
        def _complete(self, request):
            out.mkdir()
            return super()._complete(request)

    assert run("-i", source, "-o", out, "--quiet", model=Blocker()) == 2
    said = capsys.readouterr().err
    assert "out.parquet: cannot write" in said and "all rows are safe in" in said
    out.rmdir()
    again = FakeLLM()
    assert run("-i", source, "-o", out, "--quiet", model=again) == 0 and again.served == []
    assert [row["custom_id"] for row in read_parquet(out)] == ["a"]


def test_bad_bodies_are_error_rows(tmp_path):
    rows = [completion("a"), completion("b"), completion("c"), completion("d")]
    table = [
        row | {"body": body}
        for row, body in zip(rows, ["{broken", "5", '{}, "custom_id": "x"', '{"prompt":\n"x"}'])
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "in.parquet")
    assert run("-i", tmp_path / "in.parquet", "-o", tmp_path / "out", "--quiet") == 1
    codes = {
        row["error"]["line"]: row["error"]["code"] for row in read_rows(tmp_path / "out") if row["error"]
    }
    assert codes == {1: "invalid_json", 2: "invalid_type", 3: "invalid_json"}


def test_what_is_no_batch_in_parquet_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "text.parquet").write_bytes(b"not parquet at all")
    parquet.write_table(
        pyarrow.Table.from_pylist([{"custom_id": "a", "url": "x"}]), tmp_path / "lacks.parquet"
    )
    for name, said in [
        ("text.parquet", "cannot read this input"),
        ("lacks.parquet", "lacks the column body"),
    ]:
        assert run("-i", tmp_path / name, "-o", tmp_path / "out") == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_damaged_file_answers_what_comes_before(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", [completion(f"r{i}", f"{i} " * 50) for i in range(6000)])
    start = parquet.ParquetFile(source).metadata.row_group(80).column(0).dictionary_page_offset
    data = bytearray(source.read_bytes())
    data[start : start + 10_000] = bytes(10_000)
    source.write_bytes(data)
    assert run("-i", source, "-o", tmp_path / "out", "--quiet") == 1
    rows = read_rows(tmp_path / "out")
    assert [row["error"]["code"] for row in rows if row["error"]] == ["input_unreadable"]
    assert 4096 <= len(rows) < 6000


def test_a_parquet_output_without_its_rows_is_not_touched(tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", [completion("a")])
    (tmp_path / "out.parquet").write_bytes(b"precious")
    assert run("-i", source, "-o", tmp_path / "out.parquet") == 2
    assert "cannot be resumed" in capsys.readouterr().err
    assert (tmp_path / "out.parquet").read_bytes() == b"precious"
