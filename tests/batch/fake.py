"""A stand-in for jaxinfer.LLM: deterministic answers without a model, in an order unlike the input's."""

import random
import time

import numpy as np

from jaxinfer.core import Choice, Completion, FinishReason, TokenLogprob, Usage
from jaxinfer.errors import RequestError


class FakeTokenizer:
    """One token per byte; 0 starts a text."""

    def encode(self, text):
        return [0, *text.encode()]

    def chat(self, messages):
        roles = [message["role"] for message in messages]
        if roles[-1] == "assistant":
            raise ValueError("the last message must be the user's")
        return [0, *"".join(f"<{m['role']}>{m['content']}" for m in messages).encode()]

    def decode(self, ids):
        return bytes(token for token in ids if token).decode("utf-8", "replace")

    def token_bytes(self, token):
        return bytes([token])

    def token_text(self, token):
        return bytes([token]).decode("utf-8", "replace")


class FakeLLM:
    """Answers a prompt with its bytes reversed, cut at max_tokens. Finishes requests in a shuffled order.

    Attributes:
      served: ids of the requests that were given to it, in order.
      window: how many requests it holds at once.
    """

    def __init__(self, *, window=8, fingerprint="model-a", delay=0.0, limit=100_000, fail_after=None):
        self.tokenizer = FakeTokenizer()
        self.model_name = "fake"
        self.model_fingerprint = fingerprint
        self.window, self.delay, self.limit, self.fail_after = window, delay, limit, fail_after
        self.served = []
        self.computed_tokens = 0
        self.closed = False

    def stream(self, requests):
        shuffle = random.Random(7)
        running = []
        requests = iter(requests)
        finished = 0
        try:
            while True:
                while len(running) < self.window and (request := next(requests, None)) is not None:
                    self.served.append(request.id)
                    running.append(request)
                if not running:
                    return
                if self.fail_after is not None and finished >= self.fail_after[0]:
                    raise self.fail_after[1]
                if self.delay:
                    time.sleep(self.delay)
                finished += 1
                yield self._complete(running.pop(shuffle.randrange(len(running))))
        finally:
            self.closed = True

    def token_limit(self, request):
        prompt = len(request.prompt_ids)
        if prompt > self.limit:
            raise RequestError(
                "prompt_too_long", f"the prompt has {prompt} tokens; the limit is {self.limit}"
            )
        return prompt + min(request.sampling.max_tokens or prompt, prompt)

    def _complete(self, request):
        prompt = [int(token) for token in request.prompt_ids]
        params = request.sampling
        ids = tuple(token for token in reversed(prompt) if token)
        reason = FinishReason.STOP
        if params.max_tokens is not None and len(ids) > params.max_tokens:
            ids, reason = ids[: params.max_tokens], FinishReason.LENGTH
        choices = tuple(
            Choice(
                index=i,
                text=self.tokenizer.decode(ids) if self.tokenizer else "",
                token_ids=ids,
                finish_reason=reason,
                logprobs=_logprobs(ids, params),
            )
            for i in range(params.n)
        )
        usage = Usage(len(prompt), len(ids) * params.n, len(prompt) // 2)
        self.computed_tokens += len(prompt) + len(ids) * params.n
        return Completion(request_id=request.id, choices=choices, usage=usage)

    def metrics(self):
        return {"steps": len(self.served), "compilations": 0, "computed_tokens": self.computed_tokens}


def _logprobs(ids, params):
    if params.logprobs is None:
        return None

    def top(token):
        return tuple((token + i, -0.5 - i) for i in range(params.logprobs))

    return tuple(TokenLogprob(token, -np.inf if token == 33 else -0.5, top(token)) for token in ids)


def chat(custom_id, text="hello", **body):
    """An input row."""
    messages = [{"role": "user", "content": text}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, "max_tokens": 8} | body,
    }


def completion(custom_id, prompt="hello", **body):
    """An input row."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": prompt} | body,
    }
