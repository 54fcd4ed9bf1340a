"""The pocket model: a tiny world, a mixture-of-experts model trained on it, and its fixed evaluation."""

from __future__ import annotations

from bench.result import Result


def run(*, quick: bool, options: list[str]) -> Result:
    """`python -m bench pocket`."""
    from bench.pocket import evaluate  # with the engine, which training does not need

    return evaluate.run(quick=quick, options=options)
