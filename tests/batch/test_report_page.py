"""The report of a run of the embedded model, as a browser shows it."""

import itertools
import json
import random

import pytest

from jaxinfer.batch.cli import main

from . import browser
from .fake import completion

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed")

CHARTS = {
    "Tokens per second": 2,
    "Rows per second": 1,
    "Sequences running": 1,
    "Padding": 1,
    "Compute demanded": 1,
    "Memory traffic demanded": 4,
    "Compute per byte": 1,
    "Tokens through the model": 4,
    "Prefix hits": 2,
    "KV pages in use": 4,
    "Prompt lengths": 5,
    "Answer lengths": 5,
}  # marks of each: a curve, a curve and its area, or at least so many bars
UNITS = {
    "Tokens per second": "tokens/s",
    "Compute demanded": "FLOP/s",
    "Memory traffic demanded": "B/s",
    "Prefix hits": "% of prompt tokens",
    "KV pages in use": "pages",
}


def make_report(folder, rows):
    source, page = folder / "in.jsonl", folder / "report.html"
    source.write_bytes(
        b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
    )
    main(["-i", str(source), "-o", str(folder / "out.jsonl"), "--report", str(page), "--quiet"])
    return page.read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of rows of mixed kinds: shared prefixes, short and long answers, a few that are wrong."""
    draw = random.Random(5)
    shots = "".join(f"sort: {i} 3 1 -> 1 3 {i}\n" for i in range(4, 9))
    rows: list = [
        completion(f"few-{i}", f"{shots}sort: {i} 5 2 ->", max_tokens=12, temperature=0) for i in range(40)
    ]
    rows += [
        completion(f"long-{i}", f"count: {i}", max_tokens=120, temperature=0, ignore_eos=True)
        for i in range(20)
    ]
    rows += [completion(f"hot-{i}", "story: Anna", max_tokens=9, temperature="hot") for i in range(3)]
    draw.shuffle(rows)
    return make_report(tmp_path_factory.mktemp("report"), [*rows, b"{torn"])


@pytest.mark.parametrize(("width", "dark"), [(1120, False), (1120, True), (360, False)])
def test_every_chart_is_drawn_and_can_be_read(page, tmp_path, width, dark):
    seen = browser.look(page, tmp_path / "browser", width=width, dark=dark)
    assert seen.complaints == [] and seen.page["loaded"] == []
    assert seen.page["content"] <= seen.page["width"] == width, "nothing sticks out to the right"
    cards = {card["title"]: card for card in seen.page["cards"]}
    assert [title for title, card in cards.items() if card["charts"]] == list(CHARTS)
    assert set(cards) - set(CHARTS) == {"Errors", "Engine"}
    for title, card in cards.items():
        assert is_inside(card["title_box"], card["box"]), title
        for chart in card["charts"]:
            check_chart(title, chart, card)
    assert seen.screenshot.stat().st_size > 30_000
    assert (min(map(int, seen.page["paper"].strip("rgb()").split(","))) < 80) == dark


def check_chart(title, chart, card):
    marks = [mark for mark in chart["marks"] if mark["kind"] != "line"]
    assert len(marks) == CHARTS[title] or (marks[0]["kind"] == "rect" and len(marks) >= CHARTS[title]), title
    assert is_inside(chart["box"], card["box"])
    assert all(is_inside(mark["box"], chart["box"]) and mark["box"][2] > mark["box"][0] for mark in marks), (
        title
    )
    assert max(mark["box"][2] for mark in marks) - min(mark["box"][0] for mark in marks) > 0.7 * width_of(
        chart
    )
    assert any(mark["box"][3] > mark["box"][1] for mark in marks), f"{title}: all flat"
    texts = chart["texts"]
    assert all(is_inside(text["box"], chart["box"]) for text in texts), title
    assert not [
        (a["text"], b["text"]) for a, b in itertools.combinations(texts, 2) if overlap(a["box"], b["box"])
    ], title
    if title in UNITS:
        assert texts[0]["text"].endswith(UNITS[title])
    assert texts[1]["text"] in ("seconds", "tokens")


def test_one_row_and_none_make_a_page_too(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "none").mkdir()
    row = completion("only", "sort: 2 1 ->", max_tokens=8, temperature=0)
    one = browser.look(make_report(tmp_path / "one", [row]), tmp_path / "first", width=900)
    assert [card["title"] for card in one.page["cards"] if card["charts"]] == list(CHARTS)
    none = browser.look(make_report(tmp_path / "none", []), tmp_path / "second", width=900)
    assert [card["title"] for card in none.page["cards"]] == [*CHARTS, "Errors", "Engine"]
    assert one.complaints == none.complaints == one.page["loaded"] == none.page["loaded"] == []


def test_the_browser_tells_of_a_page_that_loads_or_complains(page, tmp_path):
    bad = page.replace(
        "</h1>", '</h1><img src="http://127.0.0.1:9/a.png"><script>console.error("oh")</script>'
    )
    seen = browser.look(bad, tmp_path / "browser", width=900)
    assert any("oh" in line for line in seen.complaints)
    assert seen.page["loaded"] == ["http://127.0.0.1:9/a.png"]


def is_inside(inner, outer):
    return all(a >= b - 0.6 for a, b in zip(inner[:2], outer[:2])) and all(
        a <= b + 0.6 for a, b in zip(inner[2:], outer[2:])
    )


def overlap(a, b):
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 3


def width_of(chart):
    return chart["box"][2] - chart["box"][0]
