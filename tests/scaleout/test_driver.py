"""A driver process that is interrupted, killed, or joins a cluster that runs: nothing is lost, and nothing is left running."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from batch.fake import completion

pytestmark = pytest.mark.slow
ROWS = 150


class Drive:
    def __init__(self, folder: Path):
        self.folder, self.source, self.out = folder, folder / "in.jsonl", folder / "out.jsonl"
        (folder / "log").mkdir()
        rows = [completion(f"r{i}", f"prefix {i % 5} {'-' * 40} {i}", max_tokens=9) for i in range(ROWS)]
        self.source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, *options: str, delay: float = 0.0, source: str | None = None) -> subprocess.Popen:
        command = [sys.executable, str(Path(__file__).parent / "drive.py"), str(self.folder), str(delay)]
        files = ["-i", source or str(self.source), "-o", str(self.out)]
        return subprocess.Popen(
            [*command, *files, *options], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ends(self, *options: str, stdin: str | None = None, source: str | None = None) -> tuple[int, str]:
        process = self.start(*options, source=source)
        said = process.communicate(stdin, timeout=300)[1]
        return process.returncode, said

    def names(self) -> list[str]:
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        return [json.loads(line)["custom_id"] for line in lines]

    def rows(self) -> int:
        return self.out.read_bytes().count(b"\n") if self.out.exists() else 0

    def engines(self) -> list[int]:
        """Worker processes that are still there."""
        return [int(file.name) for file in (self.folder / "log").iterdir() if _runs(int(file.name))]


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def drive(tmp_path):
    return Drive(tmp_path)


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_interrupted_and_killed_drivers_lose_nothing_and_leave_no_worker(drive):
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        end_a_driver(drive, number, status, drive.rows() + 20)
    assert drive.ends("--ray")[0] == 0
    assert sorted(drive.names()) == sorted(f"r{i}" for i in range(ROWS))


def end_a_driver(drive, number, status, rows):
    """Once so many rows are there."""
    process = drive.start("--ray", delay=0.05)
    wait_for(lambda: drive.rows() >= rows or process.poll() is not None)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == status, said
    assert status < 0 or "the same command goes on" in said
    wait_for(lambda: not drive.engines())
    assert rows <= drive.rows() < ROWS


def test_a_driver_that_is_ended_while_ray_starts_says_so(drive):
    process = drive.start("--ray")
    wait_for(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip())
    process.send_signal(signal.SIGTERM)
    assert "nothing was written" in process.communicate(timeout=120)[1] and process.returncode == 130
    assert not drive.out.exists()


def test_rows_from_stdin_in_input_order_on_a_cluster_that_runs(drive, monkeypatch):
    ray = [str(Path(sys.executable).with_name("ray"))]
    for name, value in ("USAGE_STATS_ENABLED", "0"), ("AUTH_MODE", "token"), ("AUTH_TOKEN", uuid4().hex):
        monkeypatch.setenv(f"RAY_{name}", value)  # newer versions of Ray ask for a token
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = [
        *ray,
        "start",
        "--head",
        f"--port={port}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--block",
    ]
    head = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        joins = [f"--ray=127.0.0.1:{port}", "--order", "input"]
        deadline = time.monotonic() + 120
        while True:
            status, said = drive.ends(*joins, stdin=drive.source.read_text(), source="-")
            if status == 0 or time.monotonic() > deadline:
                break
        assert status == 0, said
        assert drive.names() == [f"r{i}" for i in range(ROWS)]
        assert len(list((drive.folder / "log").iterdir())) == 2
    finally:
        head.terminate()
        head.wait(60)
