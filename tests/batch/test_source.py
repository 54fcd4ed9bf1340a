"""Lines from files, gzip files and pipes."""

import gzip
import io
import os
import threading

import pytest

from jaxinfer.batch.source import InputError, Source


def read(*paths, limit=1024, **options):
    return list(Source([str(path) for path in paths], max_line_bytes=limit, **options))


def write(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_line_endings_marks_and_blank_lines(tmp_path, name):
    path = write(tmp_path / name, b"\xef\xbb\xbfone\r\n\n  \ntwo \n\nthree")
    lines = read(path)
    assert [(line.number, line.raw) for line in lines] == [(1, b"one"), (4, b"two"), (6, b"three")]
    assert {line.file for line in lines} == {str(path)}


def test_several_inputs_are_read_in_turn(tmp_path):
    first, second = write(tmp_path / "a", b"1\n2\n"), write(tmp_path / "b.gz", b"3\n")
    lines = read(first, "-", second, stdin=io.BytesIO(b"x\ny"))
    assert [(line.input, line.number, line.raw) for line in lines] == [
        (0, 1, b"1"), (0, 2, b"2"), (1, 1, b"x"), (1, 2, b"y"), (2, 1, b"3"),
    ]  # fmt: skip


def test_long_lines_are_cut_off_and_the_rest_goes_on(tmp_path):
    long = b"x" * 5_000_000
    lines = read(write(tmp_path / "a", b"a\n" + long + b"\n" + b"y" * 1024 + b"\nb\n" + long))
    assert [line.number for line in lines] == [1, 2, 3, 4, 5]
    assert [line.problem.code if line.problem else line.raw[:1] for line in lines] == [
        b"a", "line_too_long", b"y", b"b", "line_too_long",
    ]  # fmt: skip
    assert "1024 bytes" in lines[1].problem.message


def test_a_gzip_that_breaks_gives_the_lines_before_and_an_error(tmp_path):
    rows = b"".join(os.urandom(40).hex().encode() + b"\n" for _ in range(5000))
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(rows)[:-20_000])
    *good, last = read(path)
    assert len(good) > 100 and [line.raw for line in good] == rows.split()[: len(good)]
    assert last.problem.code == "input_unreadable" and f"beyond line {len(good)}" in last.problem.message


@pytest.mark.parametrize("damage", [b"", b"not gzip at all", b"\x1f\x8b\x08"])
def test_what_is_no_gzip_is_refused_at_once(tmp_path, damage):
    path = tmp_path / "a.gz"
    path.write_bytes(damage)
    if damage:
        with pytest.raises(InputError, match="cannot read"):
            Source([str(path)], max_line_bytes=10)


def test_missing_files_and_folders_are_refused_at_once(tmp_path):
    for path, said in [(tmp_path / "none", "No such file"), (tmp_path, "is a folder")]:
        with pytest.raises(InputError, match=said):
            Source([str(path)], max_line_bytes=10)
    with pytest.raises(InputError, match="only once"):
        Source(["-", "-"], max_line_bytes=10)


def test_a_pipe_has_no_size(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"1\n2\n",))
    writer.start()
    source = Source([str(pipe)], max_line_bytes=10)
    assert source.size is None
    assert [line.raw for line in source] == [b"1", b"2"]
    writer.join()


def test_position_reaches_size(tmp_path):
    source = Source(
        [str(write(tmp_path / "a", b"1\n2\n")), str(write(tmp_path / "b.gz", b"3\n"))], max_line_bytes=9
    )
    for _ in source:
        assert 0 <= source.position <= source.size
    assert source.position == source.size
