"""What the batch bench measures is a whole run: every row read, answered and written."""

import json

import pytest

from bench.batch import Discarded, Kept, Timed, demo_lines, flow
from bench.batch_stub import measure, write_input
from jaxinfer import LLM


@pytest.mark.parametrize("kind", ["text", "ids", "chat"])
def test_the_stub_run_answers_every_row(tmp_path, kind):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_input(source, kind, 200)
    done = measure(200, str(source), str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["custom_id"] for row in rows} == {f"row-{number}" for number in range(200)}
    assert all(row["error"] is None and row["response"]["body"]["usage"]["prompt_tokens"] > 2 for row in rows)
    assert 0 < done["planning_s"] < done["seconds"]
    for part in ("reading", "serving"):
        assert list(done[part]) == [25, 50, 75, 100]
        assert all(
            done["rss_at_start"] / 2 < resident <= done["peak_rss"] for resident in done[part].values()
        )


def test_a_row_of_the_result_names_what_it_measured():
    row = flow("ids", 100)
    assert row["rows"] == 100 and row["planning_rows_per_s"] > row["rows_per_s"] > 0


def test_one_run_keeps_its_rows_and_the_other_discards_them(tmp_path):
    timed, source = Timed(LLM()), tmp_path / "in.jsonl"
    lines = list(demo_lines(1))[:20]
    source.write_text("".join(line + "\n" for line in lines))
    out, kept = tmp_path / "out.jsonl", Kept()
    seconds = timed.run(source, kept)
    assert len(out.read_text().splitlines()) == 20 and 0 < kept.seconds < seconds
    assert timed.run(source, Discarded()) > 0
    assert out.read_bytes() == b""
    timed.run(source, Kept())  # nothing of the other run stays behind
    assert len(out.read_text().splitlines()) == 20
