"""The command end to end with a stand-in model: rows, order, exit status, usage errors."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.batch.cli import main

from .fake import FakeLLM, chat, completion

SERVE = str(Path(__file__).with_name("serve.py"))


def write_rows(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def run(*arguments, model=None):
    model = model or FakeLLM()
    return main([str(argument) for argument in arguments], load_model=lambda settings: model)


def read_rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def by_id(path):
    rows = read_rows(path)
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


def test_rows_are_answered_as_openai_does(tmp_path):
    types = pytest.importorskip("openai.types")
    chats = pytest.importorskip("openai.types.chat")
    source = write_rows(
        tmp_path / "in.jsonl",
        [
            chat("c", "hé!", max_tokens=50, logprobs=True, top_logprobs=2, n=2),
            chat("d", "hi"),
            completion("t", "née", max_tokens=3, logprobs=2),
            completion("u", [1, 65], max_tokens=1),
        ],
    )
    assert run("-i", source, "-o", tmp_path / "out", "--set", "batch.created=5") == 0
    rows = by_id(tmp_path / "out")
    bodies = {name: row["response"]["body"] for name, row in rows.items()}
    for name, row in rows.items():
        assert row["error"] is None and row["response"]["status_code"] == 200
        assert row["id"].startswith("batch_req_") and row["response"]["request_id"].startswith("req_")
        kind = chats.ChatCompletion if name in "cd" else types.Completion
        parsed = kind.model_validate(bodies[name], strict=True)
        assert parsed.created == 5 and parsed.model == "fake"
        assert parsed.usage.total_tokens == parsed.usage.prompt_tokens + parsed.usage.completion_tokens
        assert parsed.usage.prompt_tokens_details.cached_tokens == parsed.usage.prompt_tokens // 2
    first = bodies["c"]["choices"][0]
    assert [choice["index"] for choice in bodies["c"]["choices"]] == [0, 1]
    assert first["finish_reason"] == "stop" and first["message"]["role"] == "assistant"
    assert len(first["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert first["logprobs"]["content"][0]["logprob"] == -9999.0  # the stand-in's "!" is impossible
    assert first["logprobs"]["content"][0]["bytes"] == [ord("!")]
    assert bodies["d"]["choices"][0]["logprobs"] is None
    text = bodies["t"]["choices"][0]
    assert text["finish_reason"] == "length" and text["logprobs"]["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert text["logprobs"]["text_offset"] == [0, 1, 2] and len(text["logprobs"]["top_logprobs"][0]) == 2
    assert bodies["u"]["choices"][0]["text"] == "A"


def test_a_model_without_a_tokenizer_serves_token_ids(tmp_path):
    model = FakeLLM()
    model.tokenizer = None
    source = write_rows(
        tmp_path / "in.jsonl", [completion("ids", [1, 65], logprobs=1), completion("text"), chat("chat")]
    )
    assert run("-i", source, "-o", tmp_path / "out", model=model) == 1
    rows = by_id(tmp_path / "out")
    assert rows["ids"]["response"]["body"]["choices"][0]["logprobs"]["tokens"][0] == "token_id:65"
    assert rows["text"]["error"]["code"] == rows["chat"]["error"]["code"] == "no_tokenizer"


def test_bad_rows_become_error_rows_and_the_others_go_on(tmp_path, capsys):
    source = write_rows(
        tmp_path / "in.jsonl",
        [
            completion("good"),
            b"{broken",
            completion("long", "x" * 200),
            completion("good", "again"),
            chat(
                "template", messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ),
            completion("odd", shoe_size=43, model="other"),
        ],
    )
    metrics, errors = tmp_path / "metrics.json", tmp_path / "errors"
    code = run(
        "-i",
        source,
        "-o",
        tmp_path / "out",
        "--metrics",
        metrics,
        "--errors",
        errors,
        model=FakeLLM(limit=100),
    )
    assert code == 1
    rows = read_rows(tmp_path / "out")
    failed = [row for row in rows if row["error"]]
    assert sorted(row["error"]["code"] for row in failed) == [
        "duplicate_custom_id", "invalid_json", "invalid_prompt", "prompt_too_long",
    ]  # fmt: skip
    assert sorted((row["error"]["line"], row["custom_id"]) for row in failed) == [
        (2, None), (3, "long"), (4, "good"), (5, "template"),
    ]  # fmt: skip
    assert all(
        row["response"] is None and f"in.jsonl:{row['error']['line']}: " in row["error"]["message"]
        for row in failed
    )
    assert read_rows(errors) == failed
    numbers = json.loads(metrics.read_text())
    assert (numbers["rows"], numbers["answered"], numbers["errors"], numbers["exit_status"]) == (6, 2, 4, 1)
    assert numbers["errors_invalid_json"] == 1 and numbers["engine_steps"] == 2
    said = capsys.readouterr().err
    assert "shoe_size has no effect" in said and "'other'" in said and "6 rows" in said


@pytest.mark.parametrize("spill", ["0", "1000000"])
def test_order(tmp_path, spill):
    rows = [completion(f"r{i}") if i % 3 else b"bad %d" % i for i in range(60)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    expected = [f"r{i}" if i % 3 else None for i in range(60)]
    out = tmp_path / "out"
    assert run("-i", source, "-o", out, "--order", "input", "--set", f"batch.reorder_bytes={spill}") == 1
    assert [row["custom_id"] for row in read_rows(out)] == expected
    assert run("-i", source, "-o", tmp_path / "out2") == 1
    assert [row["custom_id"] for row in read_rows(tmp_path / "out2")] != expected
    assert sorted(read_rows(tmp_path / "out2"), key=str) != [] and len(read_rows(tmp_path / "out2")) == 60


def test_several_inputs_gzip_and_stdin(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", [completion("a")])
    second = write_rows(tmp_path / "b.jsonl.gz", [completion("b"), completion("a", "again")])
    command = [
        sys.executable,
        SERVE,
        "0",
        "-i",
        first,
        "-i",
        second,
        "-i",
        "-",
        "-o",
        tmp_path / "out",
        "--quiet",
    ]
    for _ in range(2):  # the second time nothing is left to do
        done = subprocess.run(command, input=json.dumps(completion("c")).encode(), capture_output=True)
        assert done.returncode == 1 and done.stderr == b""
        rows = read_rows(tmp_path / "out")
        assert sorted((row["custom_id"], row["error"] is None) for row in rows) == [
            ("a", False), ("a", True), ("b", True), ("c", True),
        ]  # fmt: skip


def test_output_to_a_pipe(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [completion(f"r{i}") for i in range(5)])
    done = subprocess.run([sys.executable, SERVE, "0", "-i", source, "-o", "-"], capture_output=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 5
    assert b"5 rows" in done.stderr


def test_an_empty_input_gives_an_empty_output(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [])
    assert run("-i", source, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out").read_bytes() == b""


def test_a_gzip_that_breaks(tmp_path, capsys):
    rows = [completion(f"r{i}", str(i) * 50) for i in range(3000)]
    source = write_rows(tmp_path / "in.jsonl.gz", rows)
    whole = source.read_bytes()
    source.write_bytes(whole[:-300])
    assert run("-i", source, "-o", tmp_path / "out") == 1
    first = read_rows(tmp_path / "out")
    assert [row["error"]["code"] for row in first if row["error"]] == ["input_unreadable"]
    source.write_bytes(whole)  # repaired: the rest is done, and the error row gives way
    assert run("-i", source, "-o", tmp_path / "out") == 0
    assert by_id(tmp_path / "out").keys() == {f"r{i}" for i in range(3000)}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-i", "IN", "-o", "OUT", "--set", "engine.max_seq=1"], "did you mean max_seqs"),
        (["-i", "IN", "-o", "OUT", "--config", "none.toml"], "none.toml"),
        (["-i", "none.jsonl", "-o", "OUT"], "none.jsonl: cannot read"),
        (["-i", "IN", "-o", "nowhere/out"], "does not exist"),
        (["-i", "IN", "-o", "IN"], "is an input of this run"),
        (["-i", "IN", "-o", "."], "cannot use this output"),
        (["-i", "IN", "-o", "OUT", "--errors", "OUT"], "must be different files"),
        (["-i", "IN", "-o", "OUT", "--report", "nowhere/r.html"], "does not exist"),
        (["-i", "IN", "-o", "-", "--errors", "E"], "--errors needs an output that is a file"),
    ],
)
def test_wrong_usage_exits_2_before_any_work(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    before = write_rows(tmp_path / "IN", [completion("a")]).read_bytes()
    model = FakeLLM()
    assert run(*arguments, model=model) == 2
    assert said in capsys.readouterr().err
    assert model.served == [] and sorted(path.name for path in tmp_path.iterdir()) == ["IN"]
    assert (tmp_path / "IN").read_bytes() == before


def test_a_model_that_cannot_be_loaded_exits_2(tmp_path, capsys):
    from jaxinfer.errors import ModelError

    source = write_rows(tmp_path / "in.jsonl", [completion("a")])

    def load(settings):
        raise ModelError(f"{settings.model.path}: no such folder")

    assert main(["-i", str(source), "-o", str(tmp_path / "out"), "--model", "m"], load_model=load) == 2
    assert "m: no such folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as caught:
        main(["-o", "x"])
    assert caught.value.code == 2


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for count in (2_000, 40_000):
        source = tmp_path / f"{count}.jsonl"
        with source.open("w") as file:
            file.writelines(json.dumps(completion(f"r{i}", "word " * 40)) + "\n" for i in range(count))
        code = (
            f"import resource, sys; sys.argv[1:] = ['0', '-i', '{source}', '-o', '{tmp_path / 'out'}{count}', '--quiet']\n"
            f"sys.path.insert(0, '{Path(SERVE).parents[2]}')\n"
            "from jaxinfer.batch.cli import main\nfrom tests.batch.fake import FakeLLM\n"
            "assert main(sys.argv[2:], load_model=lambda settings: FakeLLM()) == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        peaks.append(
            int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        )
    assert source.stat().st_size > 10 * 2**20
    assert (
        peaks[1] - peaks[0] < 12 * 1024
    )  # KiB: 38,000 rows of 16-byte digests, and what the allocator rounds up


def test_a_model_that_fails_to_load_exits_2_with_one_line(tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", [completion("a")])

    def load(settings):
        raise RuntimeError("INTERNAL: no device\nwith a long explanation")

    assert main(["-i", str(source), "-o", str(tmp_path / "out")], load_model=load) == 2
    said = capsys.readouterr().err
    assert said == "jaxinfer-batch: internal error: RuntimeError: INTERNAL: no device\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows, status", [(["a"], 0), (["a", "bad"], 1)])
def test_a_file_beside_the_output_that_cannot_be_written_keeps_the_status(tmp_path, capsys, rows, status):
    source = write_rows(tmp_path / "in.jsonl", [b"bad" if r == "bad" else completion(r) for r in rows])
    (tmp_path / "metrics").mkdir()
    extras = ["--metrics", tmp_path / "metrics", "--errors", tmp_path / "errors"]
    assert run("-i", source, "-o", tmp_path / "out", "--quiet", *extras) == status
    said = capsys.readouterr().err
    assert "metrics was not written" in said and said.count("\n") == 1
    assert len((tmp_path / "errors").read_bytes().splitlines()) == status
