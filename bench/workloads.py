"""Batches and random models that benchmarks share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.core import Request, SamplingParams
from jaxinfer.models.config import ModelConfig, MoEConfig, RopeConfig


@dataclass(frozen=True)
class Job:
    """A prompt and how many tokens its answer is forced to have."""

    prompt: list[int]
    answer: int


def mixed(
    count: int = 64, *, vocabulary: int = 0, text: Sequence[int] | None = None, seed: int = 0
) -> list[Job]:
    """45 % few-shot rows (one of 6 shared prefixes of 700-1,000 tokens, 40-120 of their own, 2-8 out), 35 % chat
    (40-400 in, 60-200 out), 20 % long answers (20-60 in, 400-800 out), in random order.

    Tokens are random ones of a `vocabulary`, or stretches of a `text`.
    """
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        size = draw.randint(low, high)
        if text is None:
            return [draw.randrange(3, vocabulary) for _ in range(size)]
        start = draw.randrange(len(text) - size)
        return list(text[start : start + size])

    prefixes = [tokens(700, 1000) for _ in range(6)]
    few_shot, chat = round(0.45 * count), round(0.35 * count)
    jobs = [Job(draw.choice(prefixes) + tokens(40, 120), draw.randint(2, 8)) for _ in range(few_shot)]
    jobs += [Job(tokens(40, 400), draw.randint(60, 200)) for _ in range(chat)]
    jobs += [Job(tokens(20, 60), draw.randint(400, 800)) for _ in range(count - few_shot - chat)]
    draw.shuffle(jobs)
    return jobs


def requests(jobs: list[Job]) -> list[Request]:
    """Greedy requests of forced length."""
    return [
        Request(
            id=str(index),
            prompt_ids=np.asarray(job.prompt, np.int32),
            sampling=SamplingParams(max_tokens=job.answer, temperature=0, ignore_eos=True),
        )
        for index, job in enumerate(jobs)
    ]


def unique_prompt_tokens(jobs: list[Job], page: int = 16) -> int:
    """Prompt tokens that are left when full pages that several prompts begin with are computed once."""
    seen: set[tuple[int, ...]] = set()
    unique = 0
    for job in jobs:
        shared = 0
        for end in range(page, len(job.prompt), page):
            key = tuple(job.prompt[:end])
            shared = end if key in seen and shared == end - page else shared
            seen.add(key)
        unique += len(job.prompt) - shared
    return unique


LLAMA_110M = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=768,
    layers=12,
    heads=12,
    kv_heads=4,
    head_dim=64,
    mlp_width=2048,
    context_length=2048,
    rope=RopeConfig(theta=10000.0, dim=64),
    dtype="float32",
)
MIXTRAL_140M = ModelConfig(
    family="mixtral",
    vocab_size=32000,
    hidden_size=512,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=64,
    mlp_width=1024,
    context_length=2048,
    rope=RopeConfig(theta=10000.0, dim=64),
    moe=MoEConfig(experts=8, experts_per_token=2, width=1024),
    dtype="float32",
)
MODELS = {"llama-110m": LLAMA_110M, "mixtral-140m": MIXTRAL_140M}


def matmul_flops(config: ModelConfig, tokens: int, sampled: int) -> float:
    """Multiply-adds, two operations each, of all weight matrices; attention's own are not counted."""
    wide, dim = config.hidden_size, config.head_dim
    attention = wide * dim * (2 * config.heads + 2 * config.kv_heads)
    total = 0
    for has_experts in config.moe_layers:
        moe = config.moe if has_experts else None
        width = moe.width * moe.experts_per_token if moe else config.mlp_width
        total += attention + 3 * wide * width + (wide * moe.experts if moe else 0)
    return 2.0 * (tokens * total + sampled * wide * config.vocab_size)
