"""What the command says at an early end is true: whoever follows it has every answer."""

import errno
import os
import re
import subprocess
import sys

import pytest

from jaxinfer.batch import journal
from jaxinfer.batch.journal import Journal
from jaxinfer.errors import EngineError, JournalError

from .fake import FakeLLM, completion
from .test_command import SERVE, by_id, read_rows, run, write_rows

ROWS = 40
WHOLE = {f"r{i}" for i in range(ROWS)}
FLUSHED = ("--quiet", "--set", "batch.flush_seconds=0")


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(ROWS)])


class Meddler(FakeLLM):
    """Lets somebody else do something to the output when some rows are in it."""

    def __init__(self, meddle):
        super().__init__()
        self.meddle, self.countdown = meddle, ROWS // 2

    def _complete(self, request):
        self.countdown -= 1
        if not self.countdown:
            self.meddle()
        return super()._complete(request)


def count_in(said, words):
    return int(re.search(rf"(\d+) {words}", said)[1])


def test_a_removed_output_is_lost_and_the_same_command_answers_again(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert run("-i", source, "-o", out, *FLUSHED, model=Meddler(out.unlink)) == 130
    said = capsys.readouterr().err
    assert f"{out}: was removed" in said and "safe" not in said
    assert count_in(said, "rows are lost; the same command answers them again") == ROWS
    assert run("-i", source, "-o", out, *FLUSHED) == 0 and by_id(out).keys() == WHOLE


def test_a_removed_folder_has_to_be_made_again(tmp_path, source, capsys):
    out = tmp_path / "folder" / "out"
    out.parent.mkdir()

    def remove():
        out.unlink()
        out.parent.rmdir()

    assert run("-i", source, "-o", out, *FLUSHED, model=Meddler(remove)) == 130
    said = capsys.readouterr().err
    assert "was removed" in said and "make its folder again" in said and "safe" not in said
    out.parent.mkdir()
    assert run("-i", source, "-o", out, *FLUSHED) == 0 and by_id(out).keys() == WHOLE


def test_what_replaced_the_output_is_not_touched(tmp_path, source, capsys):
    out, notes = tmp_path / "out", tmp_path / "notes"
    notes.write_text("mine\n")
    assert run("-i", source, "-o", out, *FLUSHED, model=Meddler(lambda: notes.replace(out))) == 130
    said = capsys.readouterr().err
    assert "was removed" in said and "rows are lost; move away what is there now" in said
    assert out.read_text() == "mine\n"
    out.unlink()
    assert run("-i", source, "-o", out, *FLUSHED) == 0 and by_id(out).keys() == WHOLE


@pytest.mark.skipif(sys.platform != "linux", reason="finds a moved file in /proc")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_moved_output_is_named_where_it_is(tmp_path, source, capsys, overwrite):
    out, elsewhere = tmp_path / "folder" / "out", tmp_path / "elsewhere" / "out"
    out.parent.mkdir()
    options = [*FLUSHED, "--overwrite"] if overwrite else FLUSHED
    model = Meddler(lambda: out.parent.rename(elsewhere.parent))
    assert run("-i", source, "-o", out, *options, model=model) == 130
    said = capsys.readouterr().err
    assert f"{out}: was moved" in said and f"rows are safe in {elsewhere}; move it back to {out}" in said
    assert ("without --overwrite" in said) == overwrite
    safe = read_rows(elsewhere)
    assert len(safe) == count_in(said, "rows are safe")
    elsewhere.parent.rename(out.parent)
    again = FakeLLM()
    assert run("-i", source, "-o", out, *FLUSHED, model=again) == 0
    assert by_id(out).keys() == WHOLE and len(again.served) == ROWS - len(safe)


@pytest.mark.parametrize("order", ["completion", "input"])
def test_the_rows_that_are_safe_are_counted(tmp_path, source, capsys, order):
    """Under "input" order rows that are finished and wait for their turn are not safe; kept rows count as well."""
    out = tmp_path / "out"
    options = ("--order", order, *FLUSHED)
    for finished in (12, 9):
        model = FakeLLM(fail_after=(finished, EngineError("the device failed")))
        assert run("-i", source, "-o", out, *options, model=model) == 2
        assert count_in(capsys.readouterr().err, f"finished rows are safe in {out}") == len(read_rows(out))
    assert len(read_rows(out)) == 21 if order == "completion" else len(read_rows(out)) < 21


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_promised_of_a_device(source, capsys, overwrite):
    options = [*FLUSHED, "--overwrite"] if overwrite else FLUSHED
    assert run("-i", source, "-o", "/dev/full", *options) == 130
    said = capsys.readouterr().err
    assert "the disk is full" in said and "safe" not in said
    assert "nothing can be resumed from /dev/full: the same command starts anew" in said


def test_nothing_is_promised_of_a_pipe(source):
    process = subprocess.Popen(
        [sys.executable, SERVE, "0.01", "-i", source, "-o", "-", "--set", "batch.flush_seconds=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "reader of this pipe has gone" in said
    assert "nothing can be resumed from standard output" in said and "safe" not in said


def test_a_disk_that_fails_to_sync_leaves_a_doubt(tmp_path, source, monkeypatch, capsys):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal.os, "fsync", fail)
    assert run("-i", source, "-o", tmp_path / "out", *FLUSHED) == 130
    said = capsys.readouterr().err
    assert "Input/output error" in said and f"{ROWS} after them may not be" in said
    assert count_in(said, "finished rows are safe") == 0


def test_what_was_written_before_the_disk_was_full_is_synced(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    synced = []
    monkeypatch.setattr(journal.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with open(tmp_path / "out", "wb", buffering=0) as file:
        pages = Journal(file, str(tmp_path / "out"), flush_seconds=0, sync_seconds=60)
        pages.append(b"one\n")
        monkeypatch.setattr(journal, "_write_all", full)
        with pytest.raises(JournalError, match="disk is full"):
            pages.append(b"two\n")
        with pytest.raises(JournalError, match="disk is full"):
            pages.close()
    assert synced == [4] and (tmp_path / "out").read_bytes() == b"one\n"
    assert pages.outcome.rows == 1
