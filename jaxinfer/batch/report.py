"""`--report`: one page that explains a run, with nothing to load from elsewhere."""

from __future__ import annotations

import string
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from jaxinfer.batch.history import History
from jaxinfer.batch.svg import bars, lines
from jaxinfer.batch.tally import Tally

_Line = tuple[str, Sequence[tuple[float, float]]]


def render(*, output: str, model: str, tally: Tally, history: History, metrics: Mapping[str, float]) -> str:
    """The page as HTML.

    Args:
      output: name of the answers' file.
      metrics: the engine's counters at the end.
    """
    template = string.Template(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    cards = [
        _chart(
            "Tokens per second",
            [("prompt", history.rate("prompt_tokens")), ("generated", history.rate("generated_tokens"))],
        ),
        _chart("Rows per second", [("finished", history.rate("rows"))]),
        _chart("Work per second: prefill takes compute, decode takes memory", _mix(history)),
        _chart(
            "Prompt tokens found in the prefix cache, per second", [("cached", history.rate("cached_tokens"))]
        ),
        _chart("Most KV pages in use so far", [("pages", history.level("engine_peak_pages"))]),
        _card("Prompt lengths (tokens)", bars(_bins(history.prompt_lengths))),
        _card("Answer lengths (tokens)", bars(_bins(history.answer_lengths))),
        _card("Errors", _table(tally.all_errors.most_common(), "no row failed")),
        _card("Engine", _table(sorted(metrics.items()), "no counters")),
    ]
    return template.substitute(
        output=escape(output),
        model=escape(model),
        date=time.strftime("%Y-%m-%d %H:%M"),
        facts="".join(f"<div>{escape(name)}<b>{escape(value)}</b></div>" for name, value in _facts(tally)),
        cards="".join(cards),
    )


def _facts(tally: Tally) -> list[tuple[str, str]]:
    prompt_rate, generated_rate = tally.rates()
    return [
        ("rows", f"{tally.rows:,}"),
        ("kept from before", f"{tally.kept:,}"),
        ("errors", f"{tally.all_errors.total():,}"),
        ("seconds", f"{tally.seconds:,.1f}"),
        ("prompt tokens/s", f"{prompt_rate:,.0f}"),
        ("generated tokens/s", f"{generated_rate:,.0f}"),
        ("prompt tokens cached", f"{tally.cached_share:.0%}"),
    ]


def _mix(history: History) -> list[_Line]:
    """Tokens through the model: those of answers are decode, the others are prefill."""
    decode = history.rate("engine_generated_tokens")
    computed = history.rate("engine_computed_tokens")
    prefill = [(at, max(0.0, all_ - part)) for (at, all_), (_, part) in zip(computed, decode)]
    return [("prefill tokens", prefill), ("decode tokens", decode)]


def _bins(lengths: Mapping[int, int]) -> list[tuple[str, float]]:
    if not lengths:
        return []
    return [(_bin_name(b), lengths.get(b, 0)) for b in range(min(lengths), max(lengths) + 1)]


def _bin_name(bin_: int) -> str:
    return str(bin_) if bin_ < 2 else f"{2 ** (bin_ - 1)}-{2**bin_ - 1}"


def _chart(title: str, series: list[_Line]) -> str:
    return _card(title, lines(series))


def _card(title: str, content: str) -> str:
    return f'<div class="card"><h2>{escape(title)}</h2>{content}</div>'


def _table(rows: Sequence[tuple[str, float]], empty: str) -> str:
    if not rows:
        return f"<p>{escape(empty)}</p>"
    cells = (f'<tr><td>{escape(name)}</td><td class="n">{_number(value)}</td></tr>' for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"
