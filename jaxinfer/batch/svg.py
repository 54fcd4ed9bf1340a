"""Charts over time and histograms as inline SVG. Colours come from the page: series s has the class `c{s}`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Curve = Sequence[tuple[float, float]]
"""(seconds, value) in the order of time."""

_WIDTH, _HEIGHT = 480, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 458, 28, 184
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SHORTEST = 0.01  # seconds that a chart can show
_TIMES = ((3600, 2 * 3600, "hours"), (60, 120, "minutes"), (1, 0, "seconds"))


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What the height of a chart means.

    Attributes:
      unit: written above the axis.
      prefixed: large values change the unit (GFLOP/s) rather than the numbers (12k tokens/s).
      whole: only whole numbers have a tick.
      top: end of the axis; None is what the values need.
      limit: a line across the chart with a name, unless it lies far above all values.
    """

    unit: str
    prefixed: bool = False
    whole: bool = False
    top: float | None = None
    limit: tuple[str, float] | None = None


def lines(series: Sequence[tuple[str, Curve]], axis: Axis) -> str:
    """Curves over time with a legend."""
    return _chart(series, [curve for _, curve in series], axis, filled=False)


def areas(series: Sequence[tuple[str, Curve]], axis: Axis) -> str:
    """Areas over time, the first lowest, each upon those before it; all curves have the same seconds."""
    stacked: list[Curve] = []
    for _, curve in series:
        below = stacked[-1] if stacked else [(x, 0.0) for x, _ in curve]
        stacked.append([(x, y + base) for (x, y), (_, base) in zip(curve, below)])
    return _chart(series, stacked, axis, filled=True)


def bars(counts: Sequence[tuple[str, float]], last_edge: str, unit: str) -> str:
    """A histogram: one bar for each (left edge, count), and the right edge of the last."""
    if not counts:
        return _nothing("nothing to count")
    ticks = _ticks(max(count for _, count in counts), whole=True)
    step = (_RIGHT - _LEFT) / len(counts)
    edges = [edge for edge, _ in counts] + [last_edge]
    every = math.ceil(len(edges) / 9)
    drawn = []
    for place, (edge, count) in enumerate(counts):
        y = _y(count / ticks[-1])
        drawn.append(
            f'<rect class="c0" x="{_LEFT + place * step + 1:.1f}" y="{y:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{_BOTTOM - y:.1f}"><title>{edge} to below {edges[place + 1]}: {count:,.0f}</title></rect>'
        )
    drawn += [
        _text(_LEFT + place * step, _BOTTOM + 17, edge, "middle")
        for place, edge in enumerate(edges)
        if place % every == 0
    ]
    return _svg(_frame(ticks, Axis(unit="rows"), unit) + "".join(drawn))


def _chart(series: Sequence[tuple[str, Curve]], curves: Sequence[Curve], axis: Axis, *, filled: bool) -> str:
    points = [point for curve in curves for point in curve]
    last = max((x for x, _ in points), default=0.0)
    if last < _SHORTEST:
        return _nothing("too short a run for a curve")
    ticks = _ticks(axis.top or _reach(max(y for _, y in points), axis), whole=axis.whole)
    drawn = []
    for number, curve in reversed(list(enumerate(curves))):
        places = [f"{_x(x / last):.1f},{_y(y / ticks[-1]):.1f}" for x, y in curve]
        if filled:
            below = curves[number - 1] if number else [(curve[0][0], 0.0), (curve[-1][0], 0.0)]
            floor = [f"{_x(x / last):.1f},{_y(y / ticks[-1]):.1f}" for x, y in reversed(below)]
            drawn.append(f'<polygon class="c{number}" points="{" ".join(places + floor)}"/>')
        drawn.append(f'<polyline class="c{number}" points="{" ".join(places)}"/>')
    if axis.limit and axis.limit[1] <= ticks[-1]:
        y = _y(axis.limit[1] / ticks[-1])
        drawn.append(f'<line class="limit" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(_text(_RIGHT, y - 5, axis.limit[0], "end"))
    length, _, unit = next(time for time in _TIMES if last >= time[1])
    seconds = [tick * length for tick in _ticks(last / length, parts=7, beyond=False)]
    drawn += [_text(_x(at / last), _BOTTOM + 17, f"{at / length:g}", "middle") for at in seconds]
    return _legend([name for name, _ in series]) + _svg(_frame(ticks, axis, unit) + "".join(drawn))


def _reach(highest: float, axis: Axis) -> float:
    near = axis.limit is not None and axis.limit[1] <= 3 * highest
    return max(highest, axis.limit[1] if axis.limit and near else 0.0)


def _ticks(highest: float, *, parts: int = 4, whole: bool = False, beyond: bool = True) -> list[float]:
    """Round numbers from 0 in about `parts` equal steps, up to the first at or beyond `highest`, or the last within it."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / parts))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= highest / parts * (1 - 1e-9))
    step = max(1.0, math.ceil(step)) if whole else step
    count = math.ceil(highest / step - 1e-9) if beyond else math.floor(highest / step + 1e-9)
    return [round(i * step, 12) for i in range(count + 1)]


def _frame(ticks: Sequence[float], axis: Axis, below: str) -> str:
    """Grid, the ticks' values, and the names of both axes."""
    size, prefix = _prefix(ticks[-1]) if axis.prefixed else (1.0, "")
    parts = [_text(0, 13, prefix + axis.unit, "start"), _text(_RIGHT, _HEIGHT - 8, below, "end")]
    for tick in ticks:
        y = _y(tick / ticks[-1])
        parts.append(f'<line class="tick" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, _short(tick / size), "end"))
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    keys = (f'<span><i class="c{number}"></i>{escape(name)}</span>' for number, name in enumerate(names))
    return f'<div class="legend">{"".join(keys)}</div>'


def _svg(content: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{content}</svg>'


def _nothing(why: str) -> str:
    return f'<p class="nothing">{why}</p>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _x(share: float) -> float:
    return _LEFT + share * (_RIGHT - _LEFT)


def _y(share: float) -> float:
    return _BOTTOM - share * (_BOTTOM - _TOP)


def _prefix(value: float) -> tuple[float, str]:
    return next(((size, name) for size, name in _PREFIXES if value >= size), (1.0, ""))


def _short(value: float) -> str:
    size, name = _prefix(value)
    return f"{value / size:.4g}{name}"


def with_unit(value: float, unit: str) -> str:
    """Such as 12.3 GFLOP."""
    size, name = _prefix(value)
    return f"{value / size:.3g} {name}{unit}"
