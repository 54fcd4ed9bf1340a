"""Makes the scanner of a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxinfer.schedule.blend import BlendScanner
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.lengths import Expected
from jaxinfer.schedule.plan import Plan
from jaxinfer.schedule.scanner import FixedOrder, PaperScanner

Make = Callable[..., Any]


def _plain(kind: type, *given: Any) -> Any:
    return kind(*given)


def fixed_scanner(
    order: np.ndarray,
    prompt: np.ndarray,
    expected: Expected,
    *,
    capacity: int,
    max_tokens: int,
    make: Make = _plain,
) -> Any:
    """Args:
    make: `simulate.compiled` for a fast one.
    """
    return make(FixedOrder, order, prompt, expected.length, capacity, max_tokens)


def paper_scanner(
    plan: Plan,
    expected: Expected,
    *,
    capacity: int,
    max_tokens: int,
    quantum: int = 128,
    make: Make = _plain,
) -> Any:
    """BlendServe's own."""
    tree = plan.tree
    columns = (
        plan.order,
        plan.starts,
        plan.density,
        plan.root_density,
        tree.prompt,
        tree.alone,
        expected.length,
    )
    return make(PaperScanner, *columns, capacity, max_tokens, quantum)


def blend_scanner(
    plan: Plan,
    expected: Expected,
    cost: Cost,
    *,
    capacity: int,
    max_tokens: int,
    slots: int = 1 << 30,
    quantum: int = 128,
    make: Make = _plain,
) -> Any:
    """Ours."""
    tree = plan.tree
    density = np.full(len(tree.prompt), np.inf)
    density[plan.order] = plan.by_place(plan.density)
    return make(
        BlendScanner,
        plan.order,
        density,
        plan.root_density,
        tree.prompt,
        tree.alone,
        int(tree.own[np.unique(tree.attach[plan.order])].sum()),
        expected.length,
        expected.square,
        expected.group,
        expected.weight,
        cost.token_seconds,
        cost.key_seconds,
        cost.step_seconds,
        capacity,
        slots,
        max_tokens,
        quantum,
    )
