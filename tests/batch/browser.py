"""A page in headless Chromium: what it drew, loaded and complained about."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
# Rectangles are [left, top, right, bottom] in pixels of the page.
_PROBE = """
<script>
addEventListener("load", () => {
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] }
const within = (root, what) => [...root.querySelectorAll(what)]
const report = {
  width: innerWidth, content: document.documentElement.scrollWidth, paper: getComputedStyle(document.body).backgroundColor,
  loaded: performance.getEntriesByType("resource").map(e => e.name),
  cards: within(document, ".card").map(card => ({
    box: box(card), title: card.querySelector("h3").innerText, title_box: box(card.querySelector("h3")),
    charts: within(card, "svg").map(svg => ({
      box: box(svg),
      marks: within(svg, "polyline, polygon, rect, line.limit").map(e => ({
        box: box(e), colour: getComputedStyle(e).stroke + getComputedStyle(e).fill, kind: e.tagName
      })),
      texts: within(svg, "text").map(e => ({ box: box(e), text: e.textContent })),
    })),
  })),
}
top.document.getElementById("probe").textContent = JSON.stringify(report)
})
</script>
"""
# A window is at least 500 pixels wide, a frame is not.
_FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body style="margin: 0">
<iframe style="border: 0; display: block" width="{width}" height="{height}" srcdoc="{page}"></iframe><pre id="probe"></pre>"""


@dataclass(frozen=True)
class Seen:
    """Attributes:
    page: what the probe measured.
    complaints: console messages.
    screenshot: PNG file.
    """

    page: dict[str, Any]
    complaints: list[str]
    screenshot: Path


def look(page: str, folder: Path, *, width: int, height: int = 2800, dark: bool = False) -> Seen:
    """Open a page in a window and measure what there is to see."""
    assert CHROMIUM is not None
    profile, shot, probed = folder / "profile", folder / "page.png", folder / "probed.html"
    profile.mkdir(parents=True)
    inner = page.replace("</body>", _PROBE + "</body>")
    probed.write_text(_FRAME.format(width=width, height=height, page=html.escape(inner)))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        CHROMIUM,
        *_FLAGS,
        *scheme,
        f"--user-data-dir={profile}",
        f"--window-size={max(width, 500)},{height}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", f"--screenshot={shot}", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(folder)},
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(found[1])), complaints, shot)
