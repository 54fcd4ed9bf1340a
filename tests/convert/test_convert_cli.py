"""The jaxinfer-convert command: exit statuses, messages, and interruption at the worst moment."""

import signal
import subprocess
import sys

import pytest
from folders import write_folder

from convert.cli import main
from convert.convert import convert
from jaxinfer.models.checkpoint import read_manifest

# A conversion that stops in its middle, says so, and waits for a signal.
STALLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it, and their children too
from convert import cli
from convert.writer import PartWriter
def stall(self):
    print("stalled", flush=True)
    time.sleep(120)
PartWriter.save = stall
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def source(tmp_path):
    return write_folder(tmp_path / "source")


def test_converts_and_warns_of_a_missing_tokenizer(tmp_path, source, capsys):
    assert main([str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr()
    assert "mixtral, bfloat16" in printed.out
    assert "token ids only" in printed.err
    assert read_manifest(tmp_path / "out").dtype == "bfloat16"


def test_errors_are_one_line_and_exit_2(tmp_path, source, capsys):
    (source / "model.safetensors").write_bytes(b"\0" * 4)
    assert main([str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxinfer-convert: error: ")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit) as usage:
        main([str(source)])
    assert usage.value.code == 2


@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_interrupted_run_leaves_no_folder(tmp_path, source, how, status):
    out = tmp_path / "out"
    command = [sys.executable, "-c", STALLED, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "stalled\n"
        assert len(list(tmp_path.glob(".out.*"))) == 1
        run.send_signal(how)
    assert run.returncode == status
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.*"))) == (how == signal.SIGKILL)
    convert(source, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_run_does_not_take_anothers_folder_for_an_abandoned_one(tmp_path, source):
    out = tmp_path / "out"
    command = [sys.executable, "-c", STALLED, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "stalled\n"
        convert(source, out)
        assert len(list(tmp_path.glob(".out.*"))) == 1
        first.send_signal(signal.SIGINT)
    assert read_manifest(out).dtype == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
