"""The batch command on the embedded model when disks fill up, outputs are damaged, or belong to something else."""

import os
import random
import subprocess

import pytest

from convert.convert import convert
from jaxinfer import LLM, load_config
from jaxinfer.batch.cli import main

from .mixed import mixed
from .openai_rows import check_output_row
from .test_command import read_rows
from .test_kills import answers, errors

ROWS = 150
FIXED = ("--quiet", "--set", "batch.created=1", "--set", "model.dtype=float32")


@pytest.fixture(scope="module")
def llm():
    return LLM(config=load_config(None, ["model.dtype=float32"]))  # in bfloat16 batches may differ by ties


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llm):
    """(input, output bytes) of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    source = folder / "in.jsonl"
    source.write_bytes(b"\n".join(mixed(ROWS).lines) + b"\n")
    assert run(source, folder / "out", llm) == 1
    return source, (folder / "out").read_bytes()


@pytest.fixture(scope="module")
def another_model(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "stories260K"
    convert(shared_data("checkpoints/stories260K"), folder)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes) -> a folder on a disk of this size; called again, the disk has the new size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size):
        options = ["remount", f"size={size}"] if os.path.ismount(folder) else [f"size={size}"]
        try:
            command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder]
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("file systems cannot be mounted here")
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


def run(source, out, llm, *options):
    llm.engine.forget_prefixes()
    return main(["-i", str(source), "-o", str(out), *FIXED, *options], load_model=lambda settings: llm)


def assert_same(out, whole, tmp_path):
    """The same answers and errors, every row once."""
    (tmp_path / "whole").write_bytes(whole)
    rows, expected = read_rows(out), read_rows(tmp_path / "whole")
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in expected)
    assert answers(rows) == answers(expected) and errors(rows) == errors(expected)


def test_every_kind_of_row_is_what_openai_reads(tmp_path, finished):
    (tmp_path / "whole").write_bytes(finished[1])
    kinds = set()
    for row in read_rows(tmp_path / "whole"):
        check_output_row(row)
        if row["error"] is None:
            body = row["response"]["body"]
            kinds.add((body["object"], len(body["choices"]), body["choices"][0]["logprobs"] is not None))
    chat, text = "chat.completion", "text_completion"
    assert {(chat, 1, False), (chat, 2, True), (text, 1, False), (text, 1, True), (text, 2, False)} == kinds


def test_a_disk_that_fills_up_under_the_output(tmp_path, finished, llm, small_disk, capsys):
    source, whole = finished
    out = small_disk(len(whole) // 2 // 4096 * 4096) / "out"
    options = ("--set", f"batch.spool={tmp_path}", "--set", "batch.flush_seconds=0.001")
    assert run(source, out, llm, *options) == 130
    kept = out.read_bytes()
    assert 0 < len(kept) < len(whole) and kept.endswith(b"\n")
    said = capsys.readouterr().err
    rows = kept.count(b"\n")
    assert "the disk is full; make room" in said and f"{rows} finished rows are safe in {out}" in said
    assert run(source, out, llm, *options) == 130  # and still nothing is harmed
    assert out.read_bytes().startswith(kept)
    small_disk(4 * len(whole))
    assert run(source, out, llm, *options) == 1
    assert out.read_bytes().startswith(kept)
    assert_same(out, whole, tmp_path)


def test_a_disk_that_fills_up_under_the_requests_that_wait(tmp_path, finished, llm, small_disk, capsys):
    source, whole = finished
    disk = small_disk(16384)
    options = ("--set", f"batch.spool={disk}")
    assert run(source, tmp_path / "out", llm, *options) == 130
    said = capsys.readouterr().err
    assert (
        f"{disk}: cannot hold the requests that wait: No space left" in said and "nothing was written" in said
    )
    assert not (tmp_path / "out").exists()
    small_disk(4 * len(whole))
    assert run(source, tmp_path / "out", llm, *options) == 1
    assert_same(tmp_path / "out", whole, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_an_output_cut_off_anywhere(tmp_path, finished, llm, seed):
    source, whole = finished
    dice = random.Random(seed)
    out = tmp_path / "out"
    cut = dice.randrange(len(whole))
    out.write_bytes(
        whole[:cut] + (bytes(dice.randrange(5000)) if seed == 0 else b"")
    )  # a power cut leaves zeros
    assert run(source, out, llm) == 1
    assert out.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, cut) + 1])
    assert_same(out, whole, tmp_path)


@pytest.mark.parametrize("change", ["input", "model", "dtype", "seed"])
def test_an_output_of_something_else_is_not_touched(tmp_path, finished, capsys, request, change):
    source, whole = finished
    out, other = tmp_path / "out", tmp_path / "in.jsonl"
    content = whole[: len(whole) // 2]  # with a torn row, which must not be repaired either
    out.write_bytes(content)
    os.utime(out, (1, 1))
    given = source.read_bytes()
    other.write_bytes(given.replace(b"Answer", b"answer") if change == "input" else given)
    options = {"dtype": ["model.dtype=bfloat16"], "seed": ["engine.seed=5"]}.get(change, [])
    if change == "model":
        options = [f"model.path={request.getfixturevalue('another_model')}"]
    command = ["-i", str(other), "-o", str(out), *FIXED]
    assert main([*command, *(word for option in options for word in ("--set", option))]) == 2
    said = capsys.readouterr().err
    assert "--overwrite" in said and str(out) in said
    assert out.read_bytes() == content and out.stat().st_mtime == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]
