"""page_select against a plain sort."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.page_select import page_select
from pallas_kernels.page_select.shapes import SHAPES

IMPLEMENTATIONS = ["xla", "cpu"]


def ranks_of(scores, scale):
    """[G, P] -> [P], in float64 where heads share a choice."""
    if len(scores) == 1:
        return scores[0]
    shares = scores.astype(np.float64) * scale
    top = shares.max(axis=-1, keepdims=True)
    return (shares - top - np.log(np.exp(shares - top).sum(axis=-1, keepdims=True))).max(axis=0)


def oracle(ranks, keep, first, last):
    pages = len(ranks)
    if keep >= pages:
        return list(range(pages))
    forced = [page < first or page >= pages - last for page in range(pages)]
    order = sorted(range(pages), key=lambda page: (not forced[page], -ranks[page], page))
    return sorted(order[:keep])


def chosen(selected):
    positions, number = np.asarray(selected.positions), np.asarray(selected.number)
    return [[list(p[:n]) for p, n in zip(*row)] for row in zip(positions, number)]


def check(scores, pages, keep, width, first=0, last=0, implementations=IMPLEMENTATIONS):
    for implementation in implementations:
        got = page_select(
            jnp.asarray(scores), jnp.asarray(pages, jnp.int32), jnp.asarray(keep, jnp.int32),
            width=width, first=first, last=last, scale=0.125, implementation=implementation,
        )  # fmt: skip
        assert np.all((np.asarray(got.positions) >= 0) & (np.asarray(got.positions) < scores.shape[3]))
        for row, heads in enumerate(chosen(got)):
            for head, mine in enumerate(heads):
                ranks = ranks_of(scores[row, head, :, : pages[row]], 0.125) if pages[row] else []
                assert mine == oracle(ranks, keep[row], first, last), (implementation, row, head)


KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 10,
    "ties": lambda rng, shape: rng.integers(-2, 3, shape),
    "equal": lambda rng, shape: np.full(shape, -3.5),
    "huge": lambda rng, shape: rng.choice([-3e38, -1e-40, -0.0, 0.0, 1e-40, 3e38, np.inf, -np.inf], shape),
}


def make(shape, kind="normal", seed=0):
    """Arguments of page_select; the second of several rows keeps fewer pages than there is room for."""
    rng = np.random.default_rng(seed)
    scores = KINDS[kind](rng, (len(shape.pages), shape.heads, shape.group, max(shape.pages))).astype(
        np.float32
    )
    keep = [shape.keep if row != 1 else shape.keep // 2 for row in range(len(shape.pages))]
    return jnp.asarray(scores), jnp.asarray(shape.pages, jnp.int32), jnp.asarray(keep, jnp.int32)


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes(name):
    shape = SHAPES[name]
    scores, _, keep = make(shape)
    check(np.asarray(scores), shape.pages, keep.tolist(), shape.keep, shape.first, shape.last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (1, 2)])
def test_exact_where_heads_choose_alone(kind, first, last):
    rng = np.random.default_rng(0)
    scores = KINDS[kind](rng, (6, 3, 1, 200)).astype(np.float32)
    if kind == "huge" and first == 0:
        scores[:, 1] = np.nan_to_num(scores[:, 1])
    check(scores, [200, 199, 33, 5, 1, 0], [20, 7, 32, 4, 4, 4], 32, first, last)


@pytest.mark.parametrize("group", [2, 3, 8])
def test_groups_choose_by_the_largest_share(group):
    rng = np.random.default_rng(group)
    scores = (rng.standard_normal((5, 2, group, 300)) * rng.uniform(1, 80, (5, 2, group, 1))).astype(
        np.float32
    )
    check(scores, [300, 299, 65, 7, 0], [40, 12, 64, 5, 3], 64, 1, 2)


@settings(max_examples=40, deadline=None)
@given(
    pages=st.integers(0, 70),
    keep=st.integers(3, 40),
    kind=st.sampled_from(["normal", "ties", "equal"]),
    seed=st.integers(0, 999),
)
def test_any_row(pages, keep, kind, seed):
    scores = KINDS[kind](np.random.default_rng(seed), (1, 2, 1, 70)).astype(np.float32)
    scores[..., pages:] = np.nan  # has no meaning, so no influence
    check(scores, [pages], [keep], 40, 1, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_lies_past_the_pages_has_no_influence(implementation):
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((1, 2, 3, 50)).astype(np.float32)
    dirty = scores.copy()
    dirty[..., 41:] = np.inf
    got = [
        page_select(
            jnp.asarray(s),
            jnp.array([41]),
            jnp.array([10]),
            width=12,
            first=1,
            last=1,
            implementation=implementation,
        )
        for s in (scores, dirty)
    ]
    assert chosen(got[0]) == chosen(got[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("kind", "top_p"), [("normal", 0.6), ("normal", 0.05), ("normal", 0.999), ("ties", 0.47)]
)
def test_top_p_takes_the_fewest_pages_that_hold_the_share(kind, top_p, group, implementation):
    rng = np.random.default_rng(3)
    scores = KINDS[kind](rng, (4, 2, group, 64)).astype(np.float32) * (0.3 if kind == "normal" else 1)
    pages, keep = jnp.full(4, 64), jnp.full(4, 32)
    settings = {"width": 32, "first": 1, "last": 1, "top_p": top_p, "implementation": implementation}
    got = page_select(jnp.asarray(scores), pages, keep, **settings, scale=1.0)
    for row, heads in enumerate(chosen(got)):
        for head, mine in enumerate(heads):
            ranks = ranks_of(scores[row, head], 1.0).astype(np.float64)
            if kind == "ties":  # equal to the last digit where they are in float32
                ranks = np.round(ranks, 4)
            weights = np.exp(ranks)
            weights /= weights.sum()
            order = [0, 63, *(p for p in np.argsort(-weights, kind="stable") if p not in (0, 63))]
            enough = int(np.searchsorted(np.cumsum(weights[order]), top_p)) + 1
            assert mine == sorted(order[: min(max(enough, 3), 32)])
