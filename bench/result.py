"""What a benchmark leaves behind: a table for people, one JSON object for scripts."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent


def device_name() -> str:
    """The first device, as a file name: "cpu-amd-epyc-2", "nvidia-h200"."""
    name = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        import os

        found = (
            re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
            if Path("/proc/cpuinfo").exists()
            else None
        )
        name = f"cpu {found[1] if found else name} {os.cpu_count()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


@dataclass
class Result:
    """rows: one dictionary a measured case; summary: flat, name -> number (fractions 0-1, ratios, seconds, bytes)."""

    bench: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    commit: str = field(default_factory=_commit)
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    device: str = field(default_factory=device_name)
    jax: str = jax.__version__

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        if len(self.rows) > len(names):
            table = Table(*names)
            for row in self.rows:
                table.add_row(*(_show(row.get(name, "")) for name in names))
        else:
            table = Table("", *(str(index + 1) for index in range(len(self.rows))))
            for name in names:
                table.add_row(name, *(_show(row.get(name, "")) for row in self.rows))
        console.print(f"{self.bench} on {self.device}, jax {self.jax}, commit {self.commit}")
        console.print(table)
        for name, value in self.summary.items():
            console.print(f"{name:32s} {_show(value)}")

    def write(self, path: str | None) -> Path:
        target = Path(path) if path else ROOT / "bench" / "results" / self.device / f"{self.bench}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return target


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
