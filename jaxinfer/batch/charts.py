"""Which charts a report shows of a run, and how to read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxinfer.batch.history import History
from jaxinfer.batch.svg import Axis, Curve, areas, bars, lines

_FEWEST_BARS = 5  # a single bar as wide as the chart looks like a frame


class Card(NamedTuple):
    """Attributes:
    note: one sentence on what is drawn.
    content: HTML.
    """

    title: str
    note: str
    content: str


def throughput(history: History) -> list[Card]:
    tokens = [("prompt", history.rate("prompt_tokens")), ("generated", history.rate("generated_tokens"))]
    cards = [
        Card(
            "Tokens per second",
            "Of rows when they finish; cached prompt tokens count.",
            lines(tokens, Axis(unit="tokens/s")),
        ),
        Card(
            "Rows per second",
            "Answers and errors, when they finish.",
            lines([("rows", history.rate("rows"))], Axis(unit="rows/s")),
        ),
    ]
    if history.knows("engine_running"):
        running = [("running", history.level("engine_running"))]
        padding = history.ratio("engine_padding_tokens", "engine_computed_tokens")
        cards += [
            Card(
                "Sequences running",
                "Those that share steps.",
                lines(running, Axis(unit="sequences", whole=True)),
            ),
            Card(
                "Padding",
                "Beside the tokens that go through the model.",
                lines([("padding", _percent(padding))], Axis(unit="% of computed tokens")),
            ),
        ]
    return cards


def demand(history: History) -> list[Card]:
    """What the engine asks of the machine; nothing for an engine that does not count it."""
    if not history.knows("engine_flops"):
        return []
    moved = history.rate("engine_bytes")
    cached = history.rate("engine_kv_bytes")
    weights = _rest(moved, cached)
    prefill = history.rate("engine_prefill_tokens")
    decode = _rest(history.rate("engine_computed_tokens"), prefill)
    return [
        Card(
            "Compute demanded",
            "Operations that the steps ask for, counted from the model's shapes; padding asks for none.",
            lines([("compute", history.rate("engine_flops"))], Axis(unit="FLOP/s", prefixed=True)),
        ),
        Card(
            "Memory traffic demanded",
            "Weights once a step, keys and values once a row.",
            areas([("keys and values", cached), ("weights", weights)], Axis(unit="B/s", prefixed=True)),
        ),
        Card(
            "Compute per byte",
            "High where prefill sets the pace, low where decode does: a machine is well used near its own ratio.",
            lines([("mix", history.ratio("engine_flops", "engine_bytes"))], Axis(unit="FLOP/B")),
        ),
        Card(
            "Tokens through the model",
            "Prefill takes compute, decode takes memory; cached prompt tokens take neither.",
            areas([("decode", decode), ("prefill", prefill)], Axis(unit="tokens/s")),
        ),
    ]


def memory(history: History) -> list[Card]:
    found = [
        ("rows finishing", history.ratio("cached_tokens", "prompt_tokens")),
        ("so far", history.level("cached_share")),
    ]
    cards = [
        Card(
            "Prefix hits",
            "Prompt tokens whose keys were in the cache already.",
            lines(
                [(name, _percent(curve)) for name, curve in found], Axis(unit="% of prompt tokens", top=100)
            ),
        )
    ]
    if history.knows("engine_pages"):
        pool = max((value for _, value in history.level("engine_pages")), default=0)
        pages = [
            ("running sequences", history.level("engine_pages_in_use")),
            ("prefixes kept for later", history.level("engine_pages_kept")),
        ]
        limit = ("pool", pool) if pool else None
        note = "A kept prefix makes room when a sequence needs it." + (
            f" The pool has {pool:,.0f}." if pool else ""
        )
        cards.append(Card("KV pages in use", note, areas(pages, Axis(unit="pages", whole=True, limit=limit))))
    return cards


def lengths(history: History) -> list[Card]:
    return [
        Card("Prompt lengths", "Answered rows.", _histogram(history.prompt_lengths)),
        Card("Answer lengths", "All choices of a row together.", _histogram(history.answer_lengths)),
    ]


def _rest(whole: Curve, part: Curve) -> Curve:
    return [(at, of - taken) for (at, of), (_, taken) in zip(whole, part)]


def _percent(curve: Curve) -> Curve:
    return [(at, 100 * share) for at, share in curve]


def _histogram(lengths: Mapping[int, int]) -> str:
    if not lengths:
        return bars([], "", "")
    low, high = min(lengths), max(lengths)
    while high - low < _FEWEST_BARS - 1:
        low, high = max(low - 1, 0), high + 1
    bins = range(low, high + 1)
    return bars([(_edge(b), lengths.get(b, 0)) for b in bins], _edge(bins[-1] + 1), "tokens")


def _edge(bin_: int) -> str:
    """Least length in a bin."""
    least = 2 ** (bin_ - 1) if bin_ else 0
    return f"{least // 1024}Ki" if least >= 8192 else str(least)
