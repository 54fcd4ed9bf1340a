"""The report: a whole page by itself, with true numbers in bounded memory."""

import random
import re
from html.parser import HTMLParser

import pytest

from jaxinfer.batch.history import History
from jaxinfer.batch.report import render
from jaxinfer.batch.svg import Axis, areas, bars, lines
from jaxinfer.batch.tally import Tally

from .fake import FakeLLM, completion
from .test_command import run, write_rows


class Checker(HTMLParser):
    """Counts elements and checks that they nest."""

    VOID = ("meta", "link", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        assert all(name not in ("src", "href") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_report_is_one_page_that_loads_nothing(tmp_path):
    rows = [completion(f"r{i}", "x" * (i + 1)) for i in range(60)] + [b"bad"]
    source, page = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "<report>.html"
    assert (
        run("-i", source, "-o", tmp_path / "a&b", "--report", page, "--quiet", model=FakeLLM(delay=0.02)) == 1
    )
    content = page.read_text()
    checked = Checker(content)
    assert "http" not in content and "<script" not in content
    assert (
        checked.seen.count("svg") >= 5
        and checked.seen.count("polyline") >= 5
        and checked.seen.count("rect") > 5
    )
    assert "invalid_json" in checked.text and "a&b" in checked.text and "rows61" in checked.text
    assert "nan" not in content.lower()


def test_an_interrupted_or_empty_run_has_a_report_too(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [])
    assert run("-i", source, "-o", tmp_path / "out", "--report", tmp_path / "r.html", "--quiet") == 0
    assert "no row failed" in Checker((tmp_path / "r.html").read_text()).text


@pytest.mark.parametrize("seconds", [(), (0.0,), (0.0, 0.0), (0.0, 1e-5)])
def test_a_run_that_ended_at_once_has_a_page(seconds):
    history = History()
    for at in seconds:
        history.add(at, dict.fromkeys(("rows", "engine_flops", "engine_pages", "engine_running"), 0))
    page = render(output="out", model="m", tally=Tally(), history=history, metrics={})
    assert Checker(page).seen.count("svg") == 0 and "too short" in page


def test_history_stays_small_and_its_rates_add_up():
    history = History()
    for second in range(10_000):
        history.add(second, {"rows": second * 3})
        assert len(history.points) <= 601
    assert history.points[0][0] == 0 and history.points[-1][0] == 9999
    assert all(rate == 3 for _, rate in history.rate("rows"))
    assert all(rate == 0 for _, rate in history.rate("unknown"))


def test_a_short_last_stretch_makes_no_peak():
    history = History(interval=1.0)
    for seconds, rows in [(0, 0), (1, 10), (2, 20), (2.001, 25)]:
        history.add(seconds, {"rows": rows})
    assert max(rate for _, rate in history.rate("rows")) < 16
    assert history.points[-1] == (2.001, {"rows": 25})


def test_a_level_and_a_ratio_hold_over_their_stretch():
    history = History(interval=1.0)
    for seconds, hits, asked, running in [(0, 0, 0, 0), (1, 3, 4, 7), (2, 3, 4, 5), (4, 4, 12, 1)]:
        history.add(seconds, {"hits": hits, "asked": asked, "running": running})
    assert history.level("running") == [(0, 7), (1, 7), (1, 5), (2, 5), (2, 1), (4, 1)]
    assert history.ratio("hits", "asked") == [(0, 0.75), (1, 0.75), (2, 0.125), (4, 0.125)]
    assert history.knows("hits") and not history.knows("misses")
    assert History().level("running") == History().rate("hits") == []


def test_rates_of_a_long_run_keep_the_area_below_them():
    history, total, draw = History(interval=1.0), 0, random.Random(3)
    for second in range(2_000):
        history.add(second, {"rows": total})
        total += draw.randrange(50)
    held = history.rate("rows")
    area = sum((b - a) * rate for (a, rate), (b, _) in zip(held[::2], held[1::2]))
    assert area == pytest.approx(history.points[-1][1]["rows"]) and len(held) <= 220


SERIES = [("a", [(0, 0), (3, 7), (10, 123456)]), ("b", [(0, 5), (3, 2), (10, 1)])]


@pytest.mark.parametrize(
    "drawn",
    [
        lines(SERIES, Axis(unit="x")),
        areas(SERIES, Axis(unit="B/s", prefixed=True, limit=("pool", 130_000))),
        bars([("4", 0), ("8", 7), ("16", 1)], "32", "tokens"),
        lines([("tiny", [(0, 1e-7), (1e6, 3e-7)])], Axis(unit="x")),
        lines([("nothing", [(0, 0), (5, 0)])], Axis(unit="x", whole=True)),
    ],
)
def test_charts_stay_inside_their_frame(drawn):
    points = [pair.split(",") for found in re.findall(r'points="([^"]*)"', drawn) for pair in found.split()]
    boxes = [map(float, found) for found in re.findall(r'x="([^"]*)" y="([^"]*)"', drawn)]
    assert points or "<rect" in drawn
    assert all(0 <= float(x) <= 480 and 0 <= float(y) <= 230 for x, y in [*points, *boxes])


def test_units_and_ticks_are_round():
    drawn = lines([("a", [(0, 0), (10, 55e9)])], Axis(unit="FLOP/s", prefixed=True))
    assert texts(drawn) == ["GFLOP/s", "seconds", "0", "20", "40", "60", "0", "2", "4", "6", "8", "10"]
    drawn = lines([("a", [(0, 2), (9000, 1)])], Axis(unit="rows", whole=True))
    assert texts(drawn) == ["rows", "hours", "0", "1", "2", "0", "0.5", "1", "1.5", "2", "2.5"]
    drawn = bars([("4", 2000), ("8", 0)], "16", "tokens")
    assert texts(drawn) == ["rows", "tokens", "0", "500", "1k", "1.5k", "2k", "4", "8", "16"]


def test_areas_lie_on_each_other_and_a_far_limit_is_left_out():
    stacked = areas([("a", [(0, 1), (10, 1)]), ("b", [(0, 2), (10, 2)])], Axis(unit="x", limit=("pool", 100)))
    assert "pool" not in stacked and stacked.count("<polygon") == 2
    heights = [float(y) for y in re.findall(r'c\d" points="[^,]*,([0-9.]*)', stacked)]
    floor = 184
    assert [round((floor - y) / (floor - heights[-1])) for y in heights] == [3, 3, 1, 1]


def test_nothing_to_draw_says_so():
    assert "too short" in lines([("a", [])], Axis(unit="x")) and "nothing" in bars([], "", "tokens")


def texts(drawn):
    return re.findall(r"<text[^>]*>([^<]*)<", drawn)
