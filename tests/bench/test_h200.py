"""The one call for a GPU: a part that fails or finds no time says so, the others run."""

import sys
import types

from bench import h200, kernels
from bench.result import Result


def part(outcome):
    def run(*, quick, options):
        if isinstance(outcome, Exception):
            raise outcome
        return Result("part", {}, [{"a": 1}], {"found": outcome})

    return types.SimpleNamespace(run=run)


def run(monkeypatch, tmp_path, parts, *options):
    for name, outcome in parts.items():
        monkeypatch.setitem(sys.modules, f"bench.{name}", part(outcome))
    monkeypatch.setattr(h200, "PARTS", {name: [] for name in parts})
    return h200.run(quick=True, options=["--folder", str(tmp_path), *options])


def test_a_failing_part_is_told_and_the_others_run(monkeypatch, tmp_path):
    result = run(monkeypatch, tmp_path, {"first": ValueError("no such thing"), "second": 2.0})
    assert [row["outcome"] for row in result.rows] == ["failed: ValueError: no such thing", "done"]
    assert result.summary == {"second.found": 2.0, "failed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["second.json"]


def test_no_part_begins_after_the_time(monkeypatch, tmp_path):
    result = run(monkeypatch, tmp_path, {"first": 1.0, "second": 2.0}, "--seconds", "-1")
    assert {row["outcome"] for row in result.rows} == {"no time left"} and result.summary["failed"] == 2


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    """The native kernel against its twin, and against a twin that is off."""
    one = ["--only", "page_attention pocket_edges int4"]
    assert kernels.run(quick=True, options=one).summary == {"cases": 1, "wrong": 0, "not_taken": 0}
    honest = kernels.page_attention

    def off(*args, implementation, **kwargs):
        return honest(*args, implementation=implementation, **kwargs) + 0.01 * (implementation == "xla")

    monkeypatch.setattr(kernels, "page_attention", off)
    assert kernels.run(quick=True, options=one).summary["wrong"] == 1
