"""Beam search over whole sequences, in plain Python: what the engine's has to equal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Scores = Callable[[list[int]], np.ndarray]


def beam_search(
    scores: Scores,
    prompt: list[int],
    *,
    width: int,
    most: int,
    stops: set[int] = frozenset(),
    fewest: int = 0,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> list[tuple[float, list[int]]]:
    """(score, generated tokens) of the best answers, best first. scores: all tokens -> float32 [V], log-probabilities."""
    beams = [(np.float32(0), [])]
    answers: list[tuple[np.float32, list[int]]] = []
    for length in range(1, most + 1):
        grown = []
        for total, tokens in beams:
            for token, logprob in enumerate(scores([*prompt, *tokens])):
                if logprob > -np.inf and not (length <= fewest and token in stops):
                    grown.append((np.float32(total + logprob), [*tokens, token]))
        grown.sort(key=lambda beam: -beam[0])  # stable: the better beam's first, then the smaller token's
        over = [length == most or tokens[-1] in stops for _, tokens in grown]
        divisor = np.float32(length**length_penalty)
        answers += [(total / divisor, tokens) for (total, tokens), ended in zip(grown[:width], over) if ended]
        answers = sorted(answers, key=lambda answer: -answer[0])[:width]
        beams = [beam for beam, ended in zip(grown, over) if not ended][:width]
        if not beams:
            break
        if len(answers) == width:
            longest = most if early_stopping == "never" and length_penalty > 0 else length
            hope = beams[0][0] / np.float32(longest**length_penalty)
            if early_stopping is True or hope <= answers[-1][0]:
                break
    return [(float(score), tokens) for score, tokens in answers]
