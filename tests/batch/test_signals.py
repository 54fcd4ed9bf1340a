"""Processes that are told to end, or killed: what is written stays, and the same command goes on."""

import random
import signal
import subprocess
import sys
import time

import pytest

from .fake import FakeLLM, completion
from .test_command import SERVE, by_id, run, write_rows


def start(source, out, *extra, delay="0.01", **options):
    command = [
        sys.executable,
        SERVE,
        delay,
        "-i",
        str(source),
        "-o",
        str(out),
        "--set",
        "batch.flush_seconds=0.01",
        *extra,
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


def wait_for_rows(out, count):
    deadline = time.monotonic() + 20
    while not (out.exists() and out.read_bytes().count(b"\n") >= count):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name
)
def test_signals(tmp_path, number):
    source = write_rows(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(400)])
    out = tmp_path / "out"
    process = start(source, out)
    wait_for_rows(out, 20)
    process.send_signal(number)
    said = process.communicate(timeout=20)[1].decode()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130
        assert "interrupted" in said and "goes on from there" in said and "Traceback" not in said
        assert out.read_bytes().endswith(b"\n")
    done = out.read_bytes().count(b"\n")
    assert 20 <= done < 400
    again = FakeLLM()
    assert run("-i", source, "-o", out, "--quiet", model=again) == 0
    assert len(by_id(out)) == 400 and len(again.served) == 400 - done


@pytest.mark.parametrize("kills, rows", [(5, 300), pytest.param(50, 2000, marks=pytest.mark.slow)])
def test_killed_again_and_again(tmp_path, kills, rows):
    source = write_rows(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(rows)])
    out = tmp_path / "out"
    dice = random.Random(11)
    for kill in range(1, kills + 1):
        process = start(source, out, delay="0.002")
        wait_for_rows(out, rows * kill // (kills + 2))
        time.sleep(dice.random() * 0.05)
        process.kill()
        process.communicate()
    assert run("-i", source, "-o", out, "--quiet") == 0
    assert by_id(out).keys() == {f"r{i}" for i in range(rows)}


def test_a_signal_ends_a_long_step_and_a_wait_for_input(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [completion("a")])
    process = start(source, tmp_path / "out", delay="60")
    wait_for_rows(tmp_path / "out", 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 130
    process.stderr.close()
    process = start("-", tmp_path / "out2", stdin=subprocess.PIPE)
    process.stdin.write(b"\n" * (1 << 20))  # more than a pipe holds, so it is reading once this returns
    process.stdin.flush()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 130
    assert b"nothing was written" in process.communicate()[1] and not (tmp_path / "out2").exists()


def test_a_closed_pipe(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(400)])
    process = start(source, "-", stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    said = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 130 and "reader of this pipe has gone" in said
