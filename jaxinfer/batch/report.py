"""`--report`: one page that explains a run, with nothing to load from elsewhere."""

from __future__ import annotations

import string
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from jaxinfer.batch import charts
from jaxinfer.batch.charts import Card
from jaxinfer.batch.history import History
from jaxinfer.batch.svg import with_unit
from jaxinfer.batch.tally import Tally


def render(*, output: str, model: str, tally: Tally, history: History, metrics: Mapping[str, float]) -> str:
    """The page as HTML.

    Args:
      output: name of the answers' file.
      metrics: the engine's counters at the end.
    """
    template = string.Template(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    errors = _table(tally.all_errors.most_common(), "no row failed")
    counters = _table(sorted(metrics.items()), "no counters")
    sections = [
        _section("Throughput", charts.throughput(history)),
        _section("Demand on the machine", charts.demand(history)),
        _section("Memory and sharing", charts.memory(history)),
        _section("Lengths", charts.lengths(history)),
        _section(
            "Outcome",
            [
                Card("Errors", "Rows by error code, kept ones too.", errors),
                Card("Engine", "Counters at the end.", counters),
            ],
        ),
    ]
    return template.substitute(
        output=escape(output),
        model=escape(model),
        date=time.strftime("%Y-%m-%d %H:%M"),
        facts="".join(
            f"<div>{escape(name)}<b>{escape(value)}</b></div>" for name, value in _facts(tally, metrics)
        ),
        sections="".join(sections),
    )


def _facts(tally: Tally, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    prompt_rate, generated_rate = tally.rates()
    facts = [
        ("rows", f"{tally.rows:,}"),
        ("kept from before", f"{tally.kept:,}"),
        ("errors", f"{tally.all_errors.total():,}"),
        ("seconds", f"{tally.seconds:,.1f}"),
        ("prompt tokens/s", f"{prompt_rate:,.0f}"),
        ("generated tokens/s", f"{generated_rate:,.0f}"),
        ("prompt tokens cached", f"{tally.cached_share:.0%}"),
    ]
    if "flops" in metrics:
        facts += [
            ("compute demanded", with_unit(metrics["flops"], "FLOP")),
            ("traffic demanded", with_unit(metrics["bytes"], "B")),
        ]
    return facts


def _section(title: str, cards: Sequence[Card]) -> str:
    if not cards:
        return ""
    return f'<h2>{escape(title)}</h2><div class="grid">{"".join(map(_card, cards))}</div>'


def _card(card: Card) -> str:
    note = f'<p class="note">{escape(card.note)}</p>'
    return f'<section class="card"><h3>{escape(card.title)}</h3>{note}{card.content}</section>'


def _table(rows: Iterable[tuple[str, float]], empty: str) -> str:
    cells = [
        f'<tr><td>{escape(name)}</td><td class="n">{_number(name, value)}</td></tr>' for name, value in rows
    ]
    return f"<table>{''.join(cells)}</table>" if cells else f'<p class="nothing">{escape(empty)}</p>'


def _number(name: str, value: float) -> str:
    if name == "flops":
        return with_unit(value, "FLOP")
    if name.endswith("bytes"):
        return with_unit(value, "B")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"
