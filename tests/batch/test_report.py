"""The report: a whole page by itself, with true numbers in bounded memory."""

import re
from html.parser import HTMLParser

from jaxinfer.batch.history import History
from jaxinfer.batch.svg import bars, lines

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


def test_charts_stay_inside_their_frame():
    drawn = lines([("a", [(0, 0), (3, 7), (10, 123456)]), ("b", [(0, 5), (10, 1)])]) + bars(
        [("x", 0), ("y", 7)]
    )
    points = [pair.split(",") for found in re.findall(r'points="([^"]*)"', drawn) for pair in found.split()]
    assert len(points) == 5
    assert all(0 <= float(x) <= 480 and 0 <= float(y) <= 200 for x, y in points)
    assert "too short" in lines([("a", [])]) and "nothing" in bars([])
