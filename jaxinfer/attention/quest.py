"""Quest: a decoding token attends only to the pages whose keys can score high (arXiv 2406.10774).

The authors' repository holds two selections that differ. `mode="paper"` is the one behind its accuracy numbers
(evaluation/quest_attention.py), `mode="kernel"` the one behind its speed numbers (quest/, kernels/), and `mode="shared"`
is ours: the query heads of a KV head choose together, so its pages are read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from pallas_kernels.page_bounds import Bounds
from pallas_kernels.page_scores import page_scores
from pallas_kernels.page_select import page_select

MODES = ("shared", "kernel", "paper")
BOUNDS = ("auto", "bfloat16", "int8")
PAPER_FLOOR = 3  # pages that the accuracy code never goes below


@dataclass(frozen=True, kw_only=True)
class QuestPolicy:
    """How pages are chosen.

    Attributes:
      token_budget: tokens to attend to, a multiple of page_size, the pages that are always chosen included.
      page_size: tokens per page.
      mode: "shared", "kernel" or "paper", see the module.
      first_pages, last_pages: pages at either end that "shared" always chooses. The first hold the sinks, the last
        the text at hand; both are what heads ask for most.
      dense_below: rows of at most so many tokens attend to all of them; anything up to the budget changes nothing.
      dense_layers: layers from the first that attend to everything; they tolerate little sparsity (figure 3).
      top_p: below 1, a row takes fewer pages than the budget where these hold this share of the estimated weight.
      spread: below 1, score pages by an estimate that lies so far from the middle of their keys towards the bound.
      bounds: type of the pages' bounds. "auto" is bfloat16 for "shared", rounded outward, and the keys' own type for the
        authors' modes; "int8" takes half as many bytes, and is rounded outward as well.
      reuse_steps: a choice serves so many steps, see `reuse`; the pages at the end follow the text at every step.

    dense_below, top_p, spread, bounds and reuse_steps are for "shared" alone.

    Raises:
      ConfigError: naming the attribute, its value and what is accepted.
    """

    token_budget: int
    page_size: int = 16
    mode: str = "shared"
    first_pages: int = 1
    last_pages: int = 2
    dense_below: int = 0
    dense_layers: int = 2
    top_p: float = 1.0
    spread: float = 1.0
    bounds: str = "auto"
    reuse_steps: int = 1

    def __post_init__(self):
        def require(holds: bool, name: str, accepted: str) -> None:
            if not holds:
                raise ConfigError(f"sparsity.{name} = {getattr(self, name)!r}: expected {accepted}")

        require(self.page_size > 0, "page_size", "a positive number of tokens")
        require(self.mode in MODES, "mode", f"one of {', '.join(MODES)}")
        require(self.first_pages >= 0, "first_pages", "0 or more")
        require(self.last_pages >= 1, "last_pages", "1 or more: the token attends to itself")
        least = (
            (self.forced[0] + self.forced[1] + 1) * self.page_size
            if self.mode == "shared"
            else self.page_size
        )
        multiple = self.token_budget >= least and self.token_budget % self.page_size == 0
        require(multiple, "token_budget", f"a multiple of the page size {self.page_size}, at least {least}")
        require(self.dense_below >= 0, "dense_below", "0 or more tokens")
        require(self.dense_layers >= 0, "dense_layers", "0 or more")
        require(0 < self.top_p <= 1, "top_p", "a share in (0, 1]")
        require(0 <= self.spread <= 1, "spread", "a share in [0, 1]")
        require(self.bounds in BOUNDS, "bounds", f"one of {', '.join(BOUNDS)}")
        require(self.reuse_steps >= 1, "reuse_steps", "1 or more")
        neutral = {"dense_below": 0, "top_p": 1, "spread": 1, "bounds": "auto", "reuse_steps": 1}
        for name, value in neutral.items():
            faithful = self.mode == "shared" or getattr(self, name) == value
            require(faithful, name, f"{value!r} in mode {self.mode!r}, which is the authors' own")

    @property
    def forced(self) -> tuple[int, int]:
        """Pages that are always chosen, at the start and at the end."""
        return {"shared": (self.first_pages, self.last_pages), "kernel": (0, 1), "paper": (0, 0)}[self.mode]

    @property
    def dense_tokens(self) -> int:
        """Rows of up to so many tokens attend to all of them ("paper" has no such rule)."""
        if self.mode == "paper":
            return 0
        return max(self.token_budget, self.dense_below)

    def bounds_type(self, keys: str) -> str:
        """Type of the bounds of keys of a type."""
        if self.bounds == "auto":
            return "bfloat16" if self.mode == "shared" else keys
        return self.bounds

    def choosers(self, q_heads: int, kv_heads: int) -> int:
        """Heads with a choice of their own."""
        return kv_heads if self.mode == "shared" else q_heads

    def width(self, table_width: int) -> int:
        """Pages in the longest list of a step whose page table holds `table_width`."""
        floor = PAPER_FLOOR if self.mode == "paper" else 1
        most = max(self.token_budget, self.dense_tokens)
        return min(max(-(-most // self.page_size), floor), table_width)

    def keep(self, kv_len: jax.Array) -> jax.Array:
        """Pages that a row of kv_len tokens may choose: int32, as kv_len."""
        if self.mode == "paper":
            return jnp.maximum(PAPER_FLOOR, jnp.minimum(kv_len, self.token_budget) // self.page_size)
        pages = pages_of(kv_len, self.page_size)
        return jnp.where(kv_len <= self.dense_tokens, pages, self.token_budget // self.page_size)


class Selection(NamedTuple):
    """The chosen pages, H lists per row: H is the number of KV heads in mode "shared", of query heads in the others.

    page_lists: int32 [S, H, W], page ids in the order of the text, what page_attention takes
    tokens: int32 [S, H], tokens in the list. As the order is that of the text, only the last page listed can be
        partial, whether it is the row's last page or not.
    positions: int32 [S, H, W], the same pages as positions in the row's page table; ascending up to `number`
    number: int32 [S, H], pages in the list
    """

    page_lists: jax.Array
    tokens: jax.Array
    positions: jax.Array
    number: jax.Array


def choose(
    policy: QuestPolicy,
    q: jax.Array,
    bounds: Bounds,
    layer: jax.Array | int,
    page_table: jax.Array,
    kv_len: jax.Array,
    *,
    scale: float,
) -> Selection:
    """Scores the pages of every row and chooses; arguments as for page_scores and select."""
    scores = page_scores(
        q, bounds, layer, page_table, kv_len, page_size=policy.page_size, spread=policy.spread
    )
    return select(policy, scores, page_table, kv_len, kv_heads=bounds.shape[2], scale=scale)


def select(
    policy: QuestPolicy,
    scores: jax.Array,
    page_table: jax.Array,
    kv_len: jax.Array,
    *,
    kv_heads: int,
    scale: float,
) -> Selection:
    """Chooses the pages of every row.

    scores: float32 [S, Hq, P], of page_scores
    page_table: int32 [S, P]
    kv_len: int32 [S], the new token included; 0 is a padding row
    scale: that of the attention, 1/sqrt(D)
    """
    rows, q_heads, table_width = scores.shape
    if policy.mode == "kernel":
        # Its scores are written as float16, which makes ties.
        scores = scores.astype(jnp.float16).astype(jnp.float32)
    choosers = policy.choosers(q_heads, kv_heads)
    first, last = policy.forced
    positions, count = page_select(
        scores.reshape(rows, choosers, q_heads // choosers, table_width),
        pages_of(kv_len, policy.page_size),
        policy.keep(kv_len),
        width=policy.width(table_width),
        first=first,
        last=last,
        scale=scale,
        top_p=policy.top_p,
    )
    return listed(policy, positions, count, page_table, kv_len)


def listed(
    policy: QuestPolicy, positions: jax.Array, count: jax.Array, page_table: jax.Array, kv_len: jax.Array
) -> Selection:
    """Positions [S, H, W], of which `count` [S, H] are chosen, as page ids, and how many tokens they hold."""
    rows, _, width = positions.shape
    flat = jnp.take_along_axis(page_table, positions.reshape(rows, -1), axis=1, mode="clip")
    listed = jnp.arange(width) < count[..., None]
    page_lists = jnp.where(listed, flat.reshape(positions.shape), 0)
    pages = pages_of(kv_len, policy.page_size)
    missing = (pages * policy.page_size - kv_len)[:, None]  # slots of the row's last page that are still free
    if policy.forced[1] == 0:
        final = jnp.take_along_axis(positions, jnp.maximum(count - 1, 0)[..., None], axis=2)[..., 0]
        missing = jnp.where(final == pages[:, None] - 1, missing, 0)
    tokens = count * policy.page_size - missing
    return Selection(page_lists, jnp.where(count > 0, tokens, 0), positions, count)


def pages_of(kv_len: jax.Array, page_size: int) -> jax.Array:
    """Pages that hold so many tokens."""
    return -(-kv_len // page_size)
