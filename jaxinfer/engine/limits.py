"""What a request may ask of a model and a pool."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from jaxinfer.core import Request
from jaxinfer.engine.memory import MemoryPlan
from jaxinfer.errors import KV_POOL_EXCEEDED, RequestError
from jaxinfer.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What an engine can serve; it can be sent to where requests are checked.

    Attributes:
      prompt_tail: tokens at the end of a prompt that choose pages, where anything does.
    """

    config: ModelConfig
    memory: MemoryPlan
    has_tokenizer: bool
    prompt_tail: int = 0

    def dense_tokens(self, request: Request) -> int:
        """Tokens that attend to everything: of the prompt all but its tail, and as many as are dense by policy."""
        quest = self.memory.quest
        if quest is None:
            return sys.maxsize
        return max(len(request.prompt_ids) - self.prompt_tail, quest.dense_tokens, 1)

    def token_limit(self, request: Request) -> int:
        """Most tokens of its prompt and one answer. Raises RequestError if it can never be served."""
        dense = self.dense_tokens(request)
        return token_limit(request, self.config, self.memory, self.has_tokenizer, dense)


def token_limit(
    request: Request, config: ModelConfig, memory: MemoryPlan, has_tokenizer: bool, dense_tokens: int
) -> int:
    """Most tokens of prompt and answer. Raises RequestError where the request can never be served.

    dense_tokens: of its prompt, those whose keys beams can share when they start again.
    """
    prompt, sampling = request.prompt_ids, request.sampling
    if len(prompt) == 0:
        raise RequestError("empty_prompt", "the prompt has no tokens; at least one is needed")
    vocabulary = config.vocab_size
    ids = {
        "prompt": (int(prompt.min()), int(prompt.max())),
        "logit_bias": tuple(sampling.logit_bias),
        "stop_token_ids": sampling.stop_token_ids,
    }
    for place, tokens in ids.items():
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if wrong:
            raise RequestError("invalid_token", f"{place}: token id {wrong[0]} is not in 0..{vocabulary - 1}")
    if sampling.stop and not has_tokenizer:
        raise RequestError("no_tokenizer", "stop strings need a tokenizer, which this model lacks")
    generated = 0 if request.score else max(sampling.max_tokens or 1, sampling.min_tokens)
    asked = f"{len(prompt)} prompt tokens and {generated} to generate"
    if len(prompt) + generated > memory.context:
        raise RequestError(
            "context_length_exceeded",
            f"{asked} are more than the {memory.context} tokens that the context holds",
        )
    filled = not request.score and sampling.max_tokens is None
    limit = memory.context if filled else len(prompt) + generated
    if limit > memory.pool_tokens:
        asked = f"the context of {limit} tokens, filled for want of max_tokens," if filled else asked
        raise RequestError(
            KV_POOL_EXCEEDED,
            f"{asked} are more than the {memory.pool_tokens} tokens of the KV pool",
        )
    if sampling.beam_width > 1 and not request.score:
        _check_beams(request, limit, memory, dense_tokens)
    return limit


def _check_beams(request: Request, limit: int, memory: MemoryPlan, dense_tokens: int) -> None:
    width, size = request.sampling.beam_width, memory.page_size
    if width > memory.max_seqs:
        raise RequestError(
            "invalid_value",
            f"beam_width: {width} beams are more than the {memory.max_seqs} sequences that run at once; "
            "accepted are at most engine.max_seqs",
        )
    shared = min(len(request.prompt_ids), dense_tokens) // size
    pages = shared + width * (-(-limit // size) - shared)
    if pages > memory.pages - 1:
        raise RequestError(
            KV_POOL_EXCEEDED,
            f"beam_width: {width} beams of {limit} tokens, of which they share {shared * size}, take {pages} pages; "
            f"the KV pool has {memory.pages - 1}",
        )
