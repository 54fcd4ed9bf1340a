"""Batches on a real local Ray cluster with two workers: the answers of one process, whatever happens to the workers."""

import json
import os
import signal
import sys
import threading
import time

import pytest
from batch.fake import FakeLLM, FakeTokenizer, chat, completion
from fake_rank import SLOTS, Making, given

from jaxinfer.batch.cli import main
from jaxinfer.errors import ConfigError, JournalError
from jaxinfer.scaleout import ray as scaleout
from jaxinfer.scaleout.fleet import Fleet, Front

CREDIT = SLOTS + SLOTS // 2
FIXED = ("--quiet", "--set", "batch.created=1")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers find this folder's modules
        ray.init(
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
        )
    yield ray
    ray.shutdown()


class Job:
    """A batch of rows that share prefixes, some of them bad."""

    def __init__(self, folder, monkeypatch, rows=None):
        self.folder, self.log = folder, folder / "log"
        self.log.mkdir()
        self._monkeypatch = monkeypatch
        self.source, self.out = folder / "in.jsonl", folder / "out.jsonl"
        if rows is None:
            rows = [completion(f"r{i}", f"prefix {i % 5} {'-' * 40} {i}", max_tokens=9) for i in range(120)]
            rows += [chat(f"c{i}", f"text {i}") for i in range(30)]
            rows += [completion("r1", "twice"), completion("long", "x" * 2000), {"custom_id": "no url"}]
        self.source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *options, workers=2, front="model-a", address=None, **making):
        """The exit status on workers."""

        def connect(settings, address):
            model = Front(FakeTokenizer(), "fake", front)
            return Fleet(model, settings, address, Making(str(self.log), **making))

        self._monkeypatch.setattr(scaleout, "connect", connect)
        where = [] if address is None else [address]
        return self._main("--ray", *where, "--set", f"scaleout.workers={workers}", *options)

    def run_alone(self):
        return self._main(load_model=lambda settings: FakeLLM(limit=1000))

    def _main(self, *options, load_model=None):
        command = ["-i", self.source, "-o", self.out, *FIXED, *options]
        return main([str(word) for word in command], load_model=load_model)

    def answers(self):
        return sorted(self.out.read_bytes().splitlines()) if self.out.exists() else []

    def whole(self):
        """What one process answers."""
        assert self.run_alone() in (0, 1)
        rows = self.answers()
        self.out.unlink()
        return rows


@pytest.fixture
def job(tmp_path, monkeypatch):
    return Job(tmp_path, monkeypatch)


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_answers_are_those_of_one_process(job, overlaps):
    whole = job.whole()
    metrics = job.folder / "metrics.json"
    assert job.run("--metrics", metrics, overlaps=overlaps, delay=0.003) == 1
    assert job.answers() == whole
    served = given(job.log)
    numbers = json.loads(metrics.read_text())
    assert len(served) == 2 and all(len(rows) > 20 for rows in served.values())
    assert sum(map(len, served.values())) == 150  # each row once
    assert numbers["engine_workers"] == 2 and numbers["engine_worker_failures"] == 0
    assert numbers["engine_worker_0_rows"] + numbers["engine_worker_1_rows"] == 150
    assert job.run() == 1 and job.answers() == whole  # nothing is left to do


def kill_one_worker(job, after):
    """In another thread, once so many rows are answered."""

    def wait():
        deadline = time.monotonic() + 30
        while len(job.answers()) < after and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(next(iter(given(job.log))), signal.SIGKILL)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_killed_worker_costs_only_what_it_had_in_flight(job):
    whole = job.whole()
    killer = kill_one_worker(job, after=40)
    metrics = job.folder / "metrics.json"
    assert job.run("--metrics", metrics, delay=0.02, processes=3) == 1
    killer.join()
    assert job.answers() == whole
    served = [row for rows in given(job.log).values() for row in rows]
    assert set(served) == {json.loads(row)["custom_id"] for row in whole if b'"error":null' in row}
    assert len(served) - len(set(served)) <= CREDIT
    assert len(given(job.log)) == 3  # another process took its place
    numbers = json.loads(metrics.read_text())
    assert numbers["engine_worker_failures"] == 1
    assert 1 <= numbers["engine_rows_sent_again"] <= CREDIT


def test_a_worker_that_dies_at_every_start_ends_the_run_and_it_can_go_on(job, capsys):
    whole = job.whole()
    assert job.run(dies_at=("start",)) == 2
    assert "worker " in (said := capsys.readouterr().err) and "3 starts" in said
    assert job.answers() == [] and 3 <= len(given(job.log)) <= 6  # two workers, three starts each at most
    assert job.run() == 1
    assert job.answers() == whole


def test_workers_that_die_of_their_first_rows_leave_what_is_finished(job, capsys):
    names = tuple(f"r{i}" for i in range(0, 120, 2)) + tuple(f"c{i}" for i in range(30))
    assert job.run(dies_at=names, workers=1) == 2
    said = capsys.readouterr().err
    assert "worker 0 (" in said and "without finishing a row" in said and "the same command goes on" in said
    done = job.answers()
    assert job.run() == 1
    assert set(done) <= set(job.answers()) and job.answers() == job_answers(job)


def job_answers(job):
    rows = job.answers()
    job.out.unlink()
    assert rows == job.whole()
    return rows


def test_a_row_that_kills_every_worker_is_found_out(job):
    assert job.run(dies_at=("r7",)) == 1
    rows = {json.loads(row)["custom_id"]: json.loads(row)["error"] for row in job.answers()}
    assert rows["r7"]["code"] == "engine_failure" and "ended before answering" in rows["r7"]["message"]
    assert len(rows) == 152  # two rows have the same custom_id
    assert job.run() == 1  # asked again, by workers that can answer it
    assert job.answers() == job_answers(job)


@pytest.mark.parametrize(
    ("making", "said"),
    [
        ({"package": "9.9, sources 0000"}, "has jaxinfer 9.9"),
        ({"model": "model-b"}, "has another checkpoint"),
    ],
)
def test_workers_that_would_answer_differently_are_refused(job, capsys, making, said):
    assert job.run(**making) == 2
    assert said in capsys.readouterr().err
    assert not job.out.exists()


def test_more_workers_than_fit_are_refused(job, capsys):
    assert job.run(workers=3) == 2
    assert "room for 2 workers of 1 CPU each" in capsys.readouterr().err


def test_an_address_where_nobody_answers_is_refused(job, capsys, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert job.run(address="127.0.0.1:1") == 2
    assert "--ray 127.0.0.1:1: no Ray cluster answers there" in capsys.readouterr().err
    assert not job.out.exists()


def test_without_ray_the_command_says_how_to_install_it(job, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert job.run() == 2
    assert "pip install 'jaxinfer[ray]'" in capsys.readouterr().err
    assert job.run_alone() == 1


def test_a_dataset_is_answered_as_a_file(job, cluster):
    import ray.data

    whole = [json.loads(row) for row in job.whole()]
    rows = [json.loads(line) for line in job.source.read_text().splitlines()][:150]
    data = ray.data.from_items([row | {"body": json.dumps(row["body"])} for row in rows])

    def connect(settings, address):
        return Fleet(Front(FakeTokenizer(), "fake", "model-a"), settings, address, Making(str(job.log)))

    from jaxinfer import load_config

    config = load_config(None, ["scaleout.workers=2", "batch.created=1"])
    answers = scaleout.answer(data, job.out, config=config, connect=connect).take_all()
    wanted = {row["custom_id"]: row["response"] for row in whole if row["error"] is None}
    assert len(answers) == len(wanted) == 150

    def text(response):
        return response["body"]["choices"], response["body"]["usage"]

    assert all(text(json.loads(row["response"])) == text(wanted[row["custom_id"]]) for row in answers)


@pytest.mark.slow
def test_rows_that_are_all_errors_are_written_and_their_order_kept(tmp_path, monkeypatch):
    bad = [{"custom_id": f"x{i}"} for i in range(5)] + [completion(f"long{i}", "x" * 2000) for i in range(5)]
    job = Job(tmp_path, monkeypatch, rows=bad)
    assert job.run("--order", "input") == 1
    names = [json.loads(line)["custom_id"] for line in job.out.read_text().splitlines()]
    assert names == [row["custom_id"] for row in bad] and all(not rows for rows in given(job.log).values())


def test_a_dataset_without_the_columns_of_a_batch_is_refused(tmp_path, cluster):
    import ray.data

    data = ray.data.from_items([{"custom_id": f"r{i}", "text": "a"} for i in range(3)])
    with pytest.raises(ConfigError, match="lacks the column url; needed are custom_id, url, body"):
        scaleout.answer(data, tmp_path / "out.jsonl")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_call_that_is_refused_leaves_no_worker(job, cluster):
    import ray.data

    from jaxinfer import load_config

    job.whole()
    assert job.run_alone() == 1  # the output is of another input
    fleets = []

    def connect(settings, address):
        fleets.append(
            Fleet(Front(FakeTokenizer(), "fake", "model-a"), settings, address, Making(str(job.log)))
        )
        return fleets[0]

    row = completion("other", "text")
    data = ray.data.from_items([row | {"body": json.dumps(row["body"])}])
    with pytest.raises(JournalError, match="answer no row of this input"):
        scaleout.answer(data, job.out, config=load_config(None, ["batch.created=1"]), connect=connect)
    assert [seat.actor for seat in fleets[0]._seats] == [None] * len(fleets[0]._seats)


@pytest.mark.slow
def test_a_real_model_on_two_workers_gives_the_bytes_of_one_process(tmp_path, cluster):
    asked = [
        completion(f"r{i}", f"Story {i} of a friend", max_tokens=3 + i, temperature=i % 2, seed=i)
        for i in range(10)
    ]
    asked += [chat("chat", "Who are you?"), completion("long", "x " * 200)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in asked))
    small = "model.dtype=float32 engine.max_seqs=4 engine.max_tokens_per_step=32 cache.pages=64 engine.max_context=64"
    answers = []
    for where in (["--ray", "--set", "scaleout.workers=2"], []):
        out = tmp_path / f"out-{len(where)}.jsonl"
        sets = [word for setting in small.split() for word in ("--set", setting)]
        assert main(["-i", str(source), "-o", str(out), *FIXED, *sets, *where]) == 1
        answers.append(sorted(out.read_bytes().splitlines()))
    assert answers[0] == answers[1] and len(answers[0]) == 12
