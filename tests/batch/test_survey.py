"""The whole input is read and planned before the first step."""

from .fake import FakeLLM, completion
from .test_command import by_id, run, write_rows


def test_a_depth_first_plan_serves_common_prefixes_together(tmp_path):
    heads = ["a long beginning of one kind, ", "quite another thing to begin with, "]
    rows = [completion(f"r{i}", heads[i % 2] + str(i)) for i in range(20)]
    rows.insert(3, {"custom_id": "bad"})
    source = write_rows(tmp_path / "in.jsonl", rows)
    served = {}
    for policy in ("fcfs", "dfs"):
        model = FakeLLM(window=1)
        out = tmp_path / policy
        options = ["--set", f"schedule.policy={policy}", "--set", "batch.created=1"]
        assert run("-i", source, "-o", out, *options, model=model) == 1
        served[policy] = model.served
    assert served["fcfs"] == [f"r{i}" for i in range(20)]
    first = int(served["dfs"][0][1:]) % 2
    assert served["dfs"] == [f"r{i}" for i in [*range(first, 20, 2), *range(1 - first, 20, 2)]]
    assert by_id(tmp_path / "dfs") == by_id(tmp_path / "fcfs")


def test_a_disk_that_cannot_hold_the_input_is_named_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    source = write_rows(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(20)])
    assert run("-i", source, "-o", tmp_path / "out", "--set", "batch.spool=/no/such/folder") == 2
    assert "batch.spool = /no/such/folder" in capsys.readouterr().err

    monkeypatch.setattr(
        "jaxinfer.batch.spool.tempfile.TemporaryFile",
        lambda **_: open("/dev/full", "r+b", buffering=0),  # noqa: SIM115
    )
    assert run("-i", source, "-o", tmp_path / "out") == 130
    assert "No space left" in capsys.readouterr().err and not (tmp_path / "out").exists()
