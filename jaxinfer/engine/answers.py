"""From finished sequences to the completion of their request."""

from __future__ import annotations

import hashlib

import numpy as np

from jaxinfer.core import Choice, Completion, FinishReason, Request, TokenLogprob, Usage
from jaxinfer.engine.plan import Chunk
from jaxinfer.engine.sampler import INVALID_TOKEN, Sampled
from jaxinfer.engine.sequence import Sequence
from jaxinfer.engine.stopping import StopRule, TextTokenizer
from jaxinfer.errors import RequestError


class OpenRequest:
    """A request being worked on: a sequence and a stop rule per choice."""

    def __init__(
        self,
        request: Request,
        limit: int,
        namespace: int,
        *,
        default_seed: int,
        eos_ids: tuple[int, ...],
        tokenizer: TextTokenizer | None,
        dense_tokens: int,
    ):
        self.request = request
        self._tokenizer = tokenizer
        self._rules: list[StopRule] = []
        self.sequences: list[Sequence] = []
        for choice in range(request.sampling.n):
            seed = _seed_words(request, choice, default_seed)
            self.sequences.append(
                Sequence(
                    request, choice, limit=limit, namespace=namespace, seed=seed, dense_tokens=dense_tokens
                )
            )
            self._rules.append(StopRule(request.sampling, eos_ids, tokenizer))

    @property
    def done(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    def accept(self, sequence: Sequence, sampled: Sampled, at: tuple[int, ...]) -> None:
        """Append the token sampled at index `at`, and finish the sequence if that ends it."""
        token = int(sampled.tokens[at])
        if token == INVALID_TOKEN:
            sequence.error = RequestError("model_failure", "the model's scores were not finite numbers")
            return
        sequence.append(token)
        wanted = self.request.sampling.logprobs
        if wanted is not None:
            top = zip(sampled.top_ids[at][:wanted].tolist(), sampled.top_logprobs[at][:wanted].tolist())
            alternatives = tuple((index, value) for index, value in top if index >= 0)
            sequence.logprobs.append(TokenLogprob(token, float(sampled.logprobs[at]), alternatives))
        sequence.finish_reason = self._rules[sequence.choice].accept(token)
        if sequence.finish_reason is None and sequence.known >= sequence.limit:
            sequence.finish_reason = FinishReason.LENGTH

    def take_scores(self, chunk: Chunk, scores: np.ndarray) -> None:
        """Keep the log-probabilities of the tokens that follow a chunk's. scores: float32 [count]."""
        sequence = chunk.sequence
        assert sequence.prompt_logprobs is not None
        wanted = sequence.prompt_logprobs[chunk.start : chunk.start + chunk.count]
        wanted[:] = scores[: len(wanted)]
        if chunk.start + chunk.count == sequence.limit:
            sequence.finish_reason = FinishReason.LENGTH
            if not np.isfinite(sequence.prompt_logprobs).all():
                sequence.error = RequestError("model_failure", "the model's scores were not finite numbers")

    def completion(self) -> Completion:
        error = next((s.error for s in self.sequences if s.error is not None), None)
        first = self.sequences[0]
        usage = Usage(
            prompt_tokens=first.prompt_length,
            completion_tokens=sum(s.generated for s in self.sequences),
            cached_tokens=first.cached_tokens or 0,
        )
        if error is not None:
            return Completion(request_id=self.request.id, usage=usage, error=error)
        choices = () if self.request.score else tuple(self._choice(s) for s in self.sequences)
        return Completion(
            request_id=self.request.id, choices=choices, usage=usage, prompt_logprobs=first.prompt_logprobs
        )

    def _choice(self, sequence: Sequence) -> Choice:
        assert sequence.finish_reason is not None
        wanted = self.request.sampling.logprobs is not None
        return Choice(
            index=sequence.choice,
            text=self._rules[sequence.choice].text_of(sequence.output),
            token_ids=tuple(sequence.output.tolist()),
            finish_reason=sequence.finish_reason,
            logprobs=tuple(sequence.logprobs) if wanted else None,
        )


def _seed_words(request: Request, choice: int, default_seed: int) -> tuple[int, int]:
    """Random key of a choice, as two int32: from its own seed, or from the run's seed and the request's identity."""
    own = request.sampling.seed
    source = f"seed {own}" if own is not None else f"run {default_seed} {request.id}"
    digest = hashlib.blake2b(f"{source} {choice}".encode(errors="surrogatepass"), digest_size=8).digest()
    high, low = np.frombuffer(digest, "<i4").tolist()
    return high, low
