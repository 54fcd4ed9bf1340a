"""From the settings of a run to the policy of its attention."""

from __future__ import annotations

import logging

from jaxinfer.attention.quest import QuestPolicy
from jaxinfer.config import Settings

logger = logging.getLogger("jaxinfer")


def quest_policy(settings: Settings, context_length: int) -> QuestPolicy | None:
    """How decoding tokens choose pages; None where they attend to all.

    Args:
      context_length: of the model, in tokens.

    Raises:
      ConfigError: settings that cannot be, with what is accepted.
    """
    chosen = settings.sparsity
    if not chosen.token_budget:
        return None
    policy = QuestPolicy(
        token_budget=chosen.token_budget,
        page_size=settings.cache.page_size,
        mode=chosen.mode,
        first_pages=chosen.first_pages,
        last_pages=chosen.last_pages,
        dense_below=chosen.dense_below,
        dense_layers=chosen.dense_layers,
        top_p=chosen.top_p,
        spread=chosen.spread,
        bounds=chosen.bounds,
        reuse_steps=chosen.reuse_steps,
    )
    context = settings.engine.max_context or context_length
    if policy.token_budget < context:
        return policy
    logger.warning(
        "sparsity.token_budget = %d holds the whole context of %d tokens: attention is dense",
        policy.token_budget,
        context,
    )
    return None
