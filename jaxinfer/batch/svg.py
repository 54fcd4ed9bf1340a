"""Line and bar charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_COLOURS = ("#2f6fde", "#e07b39", "#2a9d6f", "#a04fc4")
_WIDTH, _HEIGHT = 480, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 470, 8, 176


def lines(series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Curves over seconds, with a legend."""
    points = [point for _, curve in series for point in curve]
    if len(points) < 2:
        return "<p>too short a run for a curve</p>"
    last, top = max(x for x, _ in points) or 1.0, _ceiling(max(y for _, y in points))
    drawn = []
    for (_, curve), colour in zip(series, _COLOURS):
        path = " ".join(f"{_x(x / last):.1f},{_y(y / top):.1f}" for x, y in curve)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    ticks = "".join(
        _text(_x(share), _BOTTOM + 16, _short(share * last) + " s", anchor)
        for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end"))
    )
    return _legend([name for name, _ in series]) + _svg(_scale(top) + ticks + "".join(drawn))


def bars(counts: Sequence[tuple[str, float]]) -> str:
    """One bar a name, in the given order."""
    if not counts:
        return "<p>nothing to count</p>"
    top = _ceiling(max(count for _, count in counts))
    step = (_RIGHT - _LEFT) / len(counts)
    drawn = []
    for place, (name, count) in enumerate(counts):
        x, y = _LEFT + place * step, _y(count / top)
        drawn.append(
            f'<rect x="{x + step * 0.1:.1f}" y="{y:.1f}" width="{step * 0.8:.1f}" height="{_BOTTOM - y:.1f}" '
            f'fill="{_COLOURS[0]}"><title>{escape(name)}: {count:,.0f}</title></rect>'
        )
        if place % math.ceil(len(counts) / 8) == 0:
            drawn.append(_text(x + step / 2, _BOTTOM + 16, name, "middle"))
    return _svg(_scale(top) + "".join(drawn))


def _svg(content: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{content}</svg>'


def _scale(top: float) -> str:
    parts = []
    for share in (0, 0.5, 1):
        y = _y(share)
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y}" y2="{y}" stroke="#e8edf2"/>')
        parts.append(_text(_LEFT - 6, y + 4, _short(share * top), "end"))
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    keys = (
        f'<span class="key" style="background:{colour}"></span>{escape(name)}'
        for name, colour in zip(names, _COLOURS)
    )
    return f"<div>{''.join(keys)}</div>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _x(share: float) -> float:
    return _LEFT + share * (_RIGHT - _LEFT)


def _y(share: float) -> float:
    return _BOTTOM - share * (_BOTTOM - _TOP)


def _ceiling(value: float) -> float:
    """The next of 1, 2, 5, 10, ... at or above a value."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 5, 10) if step * unit >= value * (1 - 1e-9))


def _short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:.3g}"
