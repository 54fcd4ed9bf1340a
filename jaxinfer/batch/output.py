"""Completions and errors -> output rows as the OpenAI batch API writes them, one line of ASCII JSON each."""

from __future__ import annotations

import codecs
import json
import math
from dataclasses import dataclass
from typing import Protocol

from jaxinfer.batch.identity import ID_PREFIX
from jaxinfer.batch.rows import CHAT_URL, RowError
from jaxinfer.core import Choice, Completion, TokenLogprob

# Escaped to ASCII: no reader can split a line at U+2028 or fail on its encoding.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)
_NO_CHANCE = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


class TokenNames(Protocol):
    """The part of a tokenizer that writing log-probabilities needs."""

    def token_text(self, token: int) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...


class NumberedTokens:
    """Token names for a model without a tokenizer, in vLLM's spelling."""

    def token_text(self, token: int) -> str:
        return f"token_id:{token}"

    def token_bytes(self, token: int) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class Answerer:
    """What is the same in all answers of a run.

    Attributes:
      model: name of the model that answers.
      fingerprint: of model and settings; reported as `system_fingerprint`.
    """

    model: str
    fingerprint: bytes
    tokens: TokenNames

    @property
    def system_fingerprint(self) -> str:
        return "fp_" + self.fingerprint.hex()[:16]

    def row(self, key: bytes, url: str, completion: Completion, *, created: int) -> bytes:
        """One output line for a completion without an error.

        Args:
          key: digest of the request, 16 bytes.
          created: Unix time.
        """
        is_chat = url == CHAT_URL
        body = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + key.hex(),
            "object": "chat.completion" if is_chat else "text_completion",
            "created": created,
            "model": self.model,
            "choices": [self._choice(choice, is_chat) for choice in completion.choices],
            "usage": _usage(completion),
            "system_fingerprint": self.system_fingerprint,
        }
        response = {"status_code": 200, "request_id": "req_" + key.hex(), "body": body}
        return _line(key, completion.request_id, response, None)

    def _choice(self, choice: Choice, is_chat: bool) -> dict:
        shared = {"index": choice.index, "finish_reason": str(choice.finish_reason)}
        if not is_chat:
            logprobs = None if choice.logprobs is None else self._completion_logprobs(choice.logprobs)
            return shared | {"text": choice.text, "logprobs": logprobs}
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = None if choice.logprobs is None else self._chat_logprobs(choice.logprobs)
        return shared | {"message": message, "logprobs": logprobs}

    def _chat_logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict:
        content = [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in entry.top]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict:
        raw = self.tokens.token_bytes(token)
        return {"token": self.tokens.token_text(token), "bytes": list(raw), "logprob": _finite(logprob)}

    def _completion_logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict:
        # Offsets count characters of the text so far; a token may end in the middle of one.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, length = [], 0
        for entry in logprobs:
            offsets.append(length)
            length += len(decoder.decode(self.tokens.token_bytes(entry.token_id)))
        return {
            "tokens": [self.tokens.token_text(entry.token_id) for entry in logprobs],
            "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [self._top(entry) for entry in logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        named: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            named.setdefault(self.tokens.token_text(token), _finite(logprob))
        return named


def error_row(key: bytes, custom_id: str | None, code: str, message: str, line: int) -> bytes:
    """One output line for a request that has no answer."""
    return _line(key, custom_id, None, {"code": code, "message": message, "line": line})


def refused_row(key: bytes, error: RowError) -> bytes:
    return error_row(key, error.custom_id, error.code, error.message, error.line.number)


def _line(key: bytes, custom_id: str | None, response: dict | None, error: dict | None) -> bytes:
    row = {"id": ID_PREFIX + key.hex(), "custom_id": custom_id, "response": response, "error": error}
    return _ENCODER.encode(row).encode("ascii") + b"\n"


def _usage(completion: Completion) -> dict:
    usage = completion.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _finite(logprob: float) -> float:
    return float(logprob) if math.isfinite(logprob) else _NO_CHANCE
