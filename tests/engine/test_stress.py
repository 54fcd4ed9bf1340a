"""Random engines and batches, tight in every dimension, against one-by-one dense computation."""

import contextlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beam_oracle import beam_search
from helpers import answers, dense_logits, make_engine, request, variant

from jaxinfer.core import Request
from jaxinfer.engine.engine import Engine
from jaxinfer.errors import RequestError
from jaxinfer.models import RopeConfig

CONTEXT = 96
FACTORS = {"short_factor": (1.0, 1.1, 1.2, 1.3), "long_factor": (2.0, 3.0, 4.0, 5.0)}
STRETCH = {"theta": 100.0, "dim": 8, "factor": 4.0, "original_context": 40}
CONFIGS = {
    "plain": variant(context_length=CONTEXT),
    "longrope": variant(context_length=CONTEXT, rope=RopeConfig(kind="longrope", **FACTORS, **STRETCH)),
    "dynamic": variant(context_length=CONTEXT, rope=RopeConfig(kind="dynamic", **STRETCH)),
}
SHAPES = (  # pages, sequences, tokens a step, decode steps
    (13, 3, 4, 3),
    (16, 8, 16, 3),
    (40, 8, 16, 8),
    (13, 2, 1, 1),
)
SHARED = [np.random.default_rng(seed).integers(3, 97, size) for seed, size in enumerate((8, 16, 24, 40))]


def next_logits(kind: str, prompt: np.ndarray, tokens: list[int]) -> np.ndarray:
    floor = {"plain": 0, "longrope": len(tokens), "dynamic": len(prompt)}[kind]
    lengths = np.maximum(floor, np.arange(len(tokens)) + 1) if floor else None
    return dense_logits(CONFIGS[kind], tokens, lengths)[-1]


def expected(kind: str, prompt: np.ndarray, count: int, width: int) -> list[int]:
    tokens = list(prompt)
    if width > 1:

        def scores(tokens):
            return np.asarray(jax.nn.log_softmax(jnp.asarray(next_logits(kind, prompt, tokens))))

        return beam_search(scores, tokens, width=width, most=count)[0][1]
    for _ in range(count):
        tokens.append(int(next_logits(kind, prompt, tokens).argmax()))
    return tokens[len(prompt) :]


def draw_batch(
    draw: random.Random, kind: str, engine: Engine
) -> tuple[list[Request], dict[str, tuple[np.ndarray, int, int]]]:
    requests, wanted = [], {}
    for index in range(draw.choice((3, 8, 12))):
        own = np.random.default_rng(draw.randrange(5)).integers(3, 97, draw.choice((0, 0, 1, 3, 8, 9, 20)))
        prompt = np.concatenate([draw.choice(SHARED), own])
        if kind == "plain" and draw.random() < 0.15:
            requests.append(Request(id=f"s{index}", prompt_ids=prompt.astype(np.int32), score=True))
            continue
        count = min(draw.choice((1, 2, 5, 13, 30)), CONTEXT - len(prompt))
        one = request(str(index), prompt, max_tokens=count, n=draw.choice((1, 1, 2)))
        if draw.random() < 0.3:
            search = request(str(index), prompt, max_tokens=count, beam_width=draw.choice((2, 2, 3)))
            with contextlib.suppress(RequestError):  # more pages or sequences than there are
                engine.token_limit(search)
                one = search
        requests.append(one)
        wanted[str(index)] = (prompt, count, one.sampling.beam_width)
    return requests, wanted


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(i, marks=pytest.mark.slow) for i in range(12, 24))]
)
def test_random_batches(seed):
    draw = random.Random(seed)
    kind, (pages, sequences, tokens, steps) = list(CONFIGS)[seed % 3], SHAPES[seed // 3 % 4]
    overrides = (
        "cache.page_size=8",
        f"cache.pages={pages}",
        f"engine.max_seqs={sequences}",
        f"engine.max_tokens_per_step={tokens}",
        f"engine.decode_steps={steps}",
        f"engine.chunk={draw.choice((1, 7, 16))}",
    )
    engine = make_engine(CONFIGS[kind], overrides)
    for _ in range(2):
        requests, wanted = draw_batch(draw, kind, engine)
        if draw.random() < 0.5:
            stream = engine.run(requests)
            next(stream)
            stream.close()
            engine.check_integrity()
        out = answers(engine, requests)
        assert out.keys() == {r.id for r in requests}
        for name, (prompt, count, width) in wanted.items():
            for choice in out[name].choices:
                assert list(choice.token_ids) == expected(kind, prompt, count, width)
