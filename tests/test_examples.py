"""The batches of examples/ run as their README says, and show what it says that they show."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from examples import make
from jaxinfer.batch import cli

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^python -m examples\.make (.+?) \| jaxinfer-batch (.+)$", re.MULTILINE)
LINES = LINE.findall((ROOT / "examples" / "README.md").read_text())


def answers(tmp_path, capsys, kind, *options, command=()):
    """Output rows in the order of the input, and the metrics of the run."""
    make.main([kind, *options])
    source, out, metrics = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "metrics.json"))
    source.write_text(capsys.readouterr().out)
    given = ["-i", source, "-o", out, "--metrics", metrics, "--quiet", "--overwrite", "--order", "input"]
    assert cli.main([*map(str, given), *command]) == 0
    asked = [json.loads(line) for line in source.read_text().splitlines()]
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["custom_id"] for row in answered] == [row["custom_id"] for row in asked]
    assert all(row["error"] is None and row["response"]["status_code"] == 200 for row in answered)
    return answered, json.loads(metrics.read_text())


def test_readme_has_a_line_for_every_kind():
    assert [kind for kind, _ in LINES] == list(make.KINDS)
    shown = LINE.findall((ROOT / "README.md").read_text())
    assert [kind for kind, _ in shown] == list(make.KINDS)


@pytest.mark.parametrize(("kind", "rest"), LINES, ids=[kind for kind, _ in LINES])
def test_the_readme_line_answers_every_row(kind, rest, tmp_path):
    """As it stands there, but with fewer and shorter rows."""
    writer = [sys.executable, "-m", "examples.make", kind, "--rows", "8", "--tokens", "300"]
    batch = [sys.executable, "-m", "jaxinfer.batch.cli", *shlex.split(rest)]
    out, page = (tmp_path / batch[batch.index(option) + 1] for option in ("-o", "--report"))
    batch[batch.index("-o") + 1], batch[batch.index("--report") + 1] = str(out), str(page)
    written = subprocess.run(writer, cwd=ROOT, capture_output=True, check=True)
    done = subprocess.run(batch, cwd=ROOT, input=written.stdout, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 8 and "</html>" in page.read_text()


def test_few_shot_rows_share_their_prefix(tmp_path, capsys):
    rows, metrics = answers(tmp_path, capsys, "few-shot", "--rows", "40")
    usages = [row["response"]["body"]["usage"] for row in rows]
    page = 16
    for usage in usages[1:]:
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached >= usage["prompt_tokens"] - 2 * page
    assert metrics["cached_share"] > 0.85
    _, alone = answers(
        tmp_path, capsys, "few-shot", "--rows", "40", command=("--set", "cache.prefix_sharing=false")
    )
    assert alone["cached_share"] == 0 and alone["engine_flops"] > 4 * metrics["engine_flops"]


def test_sampled_completions_come_out_again(tmp_path, capsys):
    first, _ = answers(tmp_path, capsys, "completion", "--rows", "8")
    texts = [[choice["text"] for choice in row["response"]["body"]["choices"]] for row in first]
    assert [len(each) for each in texts] == [1, 1, 1, 3] * 2
    again, _ = answers(tmp_path, capsys, "completion", "--rows", "8", command=("--set", "engine.max_seqs=2"))
    assert texts == [[choice["text"] for choice in row["response"]["body"]["choices"]] for row in again]


def test_long_rows_reach_to_the_wanted_length(tmp_path, capsys):
    rows, _ = answers(tmp_path, capsys, "long-context", "--rows", "8", "--tokens", "400")
    lengths = [row["response"]["body"]["usage"]["prompt_tokens"] for row in rows]
    assert max(lengths) > 250 and max(lengths) <= 400 and min(lengths) < 0.7 * max(lengths)


def test_rows_are_the_same_every_time(capsys):
    written = set()
    for _ in range(2):
        for kind in make.KINDS:
            make.main([kind, "--rows", "5", "--tokens", "200"])
        written.add(capsys.readouterr().out)
    assert len(written) == 1
