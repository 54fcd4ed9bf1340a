"""What quantization did to every layer: a table, a plot, and JSON for scripts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxinfer.quant.calibrate import LayerReport
from jaxinfer.quant.matrices import MatrixReport

JSON, PLOT = "quantization-report.json", "quantization-report.svg"
_KINDS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#555555")
_WIDTH, _HEIGHT, _MARGIN = 720, 320, 50


def write_report(folder: Path, reports: Sequence[LayerReport]) -> None:
    """quantization-report.json and .svg."""
    rows = [dataclasses.asdict(report) for report in reports]
    (folder / JSON).write_text(json.dumps(rows, indent=1))
    (folder / PLOT).write_text(plot(reports))


def table(reports: Sequence[LayerReport]) -> Table:
    """Per layer: relative output error of each kind of matrix (root mean square over experts), clips, share of the inputs'
    energy in the outlier channels of the first matrix, and how far both streams are apart."""
    made = Table("layer", *_KINDS, "clip", "outlier energy", "drift", title="relative output error")
    for report in reports:
        errors = [_percent(_error(report, kind)) for kind in _KINDS]
        clips = [matrix.clip for matrix in report.matrices]
        first = report.matrices[0].outlier_share
        made.add_row(
            str(report.index),
            *errors,
            f"{min(clips):.2f}-{max(clips):.2f}",
            _percent(first),
            _percent(report.drift),
        )
    return made


def show(reports: Sequence[LayerReport]) -> None:
    Console(width=120).print(table(reports))


def plot(reports: Sequence[LayerReport]) -> str:
    """The same errors and the drift over the layers, as SVG."""
    curves = {kind: [_error(report, kind) for report in reports] for kind in _KINDS}
    curves["drift"] = [report.drift for report in reports]
    top = max((v for values in curves.values() for v in values if math.isfinite(v)), default=0.0) or 1.0
    across = max(1, len(reports) - 1)

    def at(index: int, value: float) -> str:
        x = _MARGIN + index / across * (_WIDTH - 2 * _MARGIN - 120)
        return f"{x:.1f},{_HEIGHT - _MARGIN - value / top * (_HEIGHT - 2 * _MARGIN):.1f}"

    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_MARGIN}" y="24">relative output error by layer</text>',
    ]
    for part in (0.0, 0.5, 1.0):
        x, y = at(0, part * top).split(",")
        drawn.append(f'<text x="{float(x) - 6}" y="{y}" text-anchor="end">{_percent(part * top)}</text>')
        end = at(across, part * top).split(",")[0]
        drawn.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#dddddd"/>')
    for place, (name, values) in enumerate(curves.items()):
        points = [at(index, value) for index, value in enumerate(values) if math.isfinite(value)]
        colour = _COLOURS[place]
        drawn.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        drawn += [
            f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{colour}"/>' for p in points
        ]
        drawn.append(f'<text x="{_WIDTH - 140}" y="{_MARGIN + 18 * place}" fill="{colour}">{name}</text>')
    return "\n".join([*drawn, "</svg>"])


def _error(report: LayerReport, kind: str) -> float:
    matrices: list[MatrixReport] = [m for m in report.matrices if m.name.startswith(kind)]
    squares = [m.error**2 for m in matrices if math.isfinite(m.error)]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.nan


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2g} %"
