"""The body of one request: its prompt, how to sample, and which fields it may hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxinfer.core import SamplingParams
from jaxinfer.errors import RequestError

COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default; a chat without a limit fills the context instead
MAX_TOKEN_ID = 2**31 - 1

_DIRECT = (
    "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "beam_width", "length_penalty", "early_stopping",
)  # fmt: skip
_UNDERSTOOD = {
    *_DIRECT, "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "stop", "stop_token_ids",
    "logprobs", "top_logprobs", "logit_bias", "use_beam_search", "best_of",
}  # fmt: skip
# Bookkeeping and transport: the answer is the same without them.
_HARMLESS = {
    "user", "metadata", "store", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls", "prediction", "request_id", "priority", "cache_salt",
}  # fmt: skip
# Would change the answer and is not supported: accepted only with a value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "suffix": ("",), "echo": (False,), "prompt_embeds": (), "structured_outputs": (),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "guided_decoding_backend": (),
    "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],), "continue_final_message": (False,),
    "add_generation_prompt": (True,), "add_special_tokens": (True,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,), "bad_words": ([],),
    "allowed_token_ids": (), "logits_processors": ([],), "truncate_prompt_tokens": (),
}  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to complete: exactly one of the three is given.

    Attributes:
      text: of a completion.
      ids: token ids of a completion.
      messages: of a chat, each {"role", "content"} with plain text.
    """

    text: str | None = None
    ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, str], ...] | None = None


def refuse_unsupported(body: dict, is_chat: bool, ignored: Callable[[str], None]) -> None:
    """Raises RequestError for a field that would change the answer if it were supported; reports unknown ones."""
    for name, value in body.items():
        if name in _UNDERSTOOD or name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            ignored(name)
        elif value is not None and not any(
            value == fine and type(value) is type(fine) for fine in _NEUTRAL[name]
        ):
            raise RequestError("unsupported_field", f"{name}: {value!r} is not supported; leave it out")
    other = "prompt" if is_chat else "messages"
    if body.get(other) is not None:
        url = "completions" if is_chat else "chat/completions"
        raise RequestError("invalid_value", f"{other}: belongs to the url /v1/{url}")


def parse_prompt(body: dict, is_chat: bool, ignored: Callable[[str], None]) -> Prompt:
    name = "messages" if is_chat else "prompt"
    value = body.get(name)
    if value is None:
        raise RequestError("missing_field", f"{name}: is missing from the body")
    if is_chat:
        return Prompt(messages=_messages(value, ignored))
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if value in ("", []):
        raise RequestError("empty_prompt", "prompt: is empty")
    if isinstance(value, str):
        return Prompt(text=value)
    if isinstance(value, list) and all(type(token) is int for token in value):
        wrong = next((token for token in value if not 0 <= token <= MAX_TOKEN_ID), None)
        if wrong is not None:
            raise RequestError("invalid_value", f"prompt: {wrong} is not a token id")
        return Prompt(ids=tuple(value))
    if isinstance(value, list) and (
        all(type(p) is str for p in value) or all(type(p) is list for p in value)
    ):
        raise RequestError(
            "invalid_value", f"prompt: {len(value)} prompts in one row; give each a row of its own"
        )
    raise RequestError("invalid_type", f"prompt: {value!r} is neither text nor a list of token ids")


def _messages(value, ignored: Callable[[str], None]) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list):
        raise RequestError("invalid_type", f"messages: {value!r} is not a list")
    if not value:
        raise RequestError("empty_prompt", "messages: is empty")
    return tuple(_message(f"messages[{i}]", message, ignored) for i, message in enumerate(value))


def _message(where: str, message, ignored: Callable[[str], None]) -> Mapping[str, str]:
    if not isinstance(message, dict):
        raise RequestError("invalid_type", f"{where}: {message!r} is not an object")
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError("invalid_value", f"{where}.role: {role!r}; accepted are {', '.join(_ROLES)}")
    for name in message.keys() - {"role", "content"}:
        if name in ("tool_calls", "function_call", "audio") and message[name]:
            raise RequestError("unsupported_field", f"{where}.{name}: is not supported")
        if message[name] is not None:
            ignored(f"messages.{name}")
    # Chat templates know "system" only; "developer" is OpenAI's newer word for it.
    return {
        "role": "system" if role == "developer" else role,
        "content": _content(where, message.get("content")),
    }


def _content(where: str, content) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            "invalid_type", f"{where}.content: {content!r} is neither text nor a list of text parts"
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            raise RequestError(
                "unsupported_content", f'{where}.content: part {kind!r}; only "text" parts are accepted'
            )
        if not isinstance(part.get("text"), str):
            raise RequestError("invalid_type", f"{where}.content: a text part's text is {part.get('text')!r}")
        texts.append(part["text"])
    return "\n".join(texts)  # as vLLM and llama.cpp join them


def parse_sampling(body: dict, is_chat: bool) -> SamplingParams:
    """Raises RequestError for a wrong type or an impossible value, naming the field."""
    values = {name: body[name] for name in _DIRECT if body.get(name) is not None}
    values["max_tokens"] = _max_tokens(body, is_chat)
    values |= _beams(body)
    values["logprobs"] = _chat_logprobs(body) if is_chat else _completion_logprobs(body)
    if (stop := body.get("stop")) is not None:
        values["stop"] = _list_of("stop", [stop] if isinstance(stop, str) else stop)
    if (ids := body.get("stop_token_ids")) is not None:
        values["stop_token_ids"] = _list_of("stop_token_ids", ids)
    if (bias := body.get("logit_bias")) is not None:
        values["logit_bias"] = _logit_bias(bias)
    try:
        # Rows of a batch mostly sample alike. Token ids stay out: (1,) equals (1.0,), which is an error.
        return SamplingParams(**values) if "stop_token_ids" in values else _shared_sampling(**values)
    except TypeError:  # unhashable: a list or an object where none belongs, or a logit_bias
        return SamplingParams(**values)


_shared_sampling = functools.lru_cache(maxsize=1024, typed=True)(SamplingParams)


def _beams(body: dict) -> dict[str, Any]:
    """Beam search as rows ask for it: `beam_width`, or `use_beam_search` with `best_of` or else `n` beams."""
    asked, best_of, width = (body.get(name) for name in ("use_beam_search", "best_of", "beam_width"))
    choices = 1 if body.get("n") is None else body["n"]
    if asked is not None and not isinstance(asked, bool):
        raise RequestError("invalid_type", f"use_beam_search: {asked!r} is not true or false")
    if width is None:
        width = (choices if best_of is None else best_of) if asked else 1
    elif asked is False and width != 1:
        raise RequestError("invalid_value", f"beam_width: {width!r} contradicts use_beam_search: false")
    if best_of not in (None, choices if width == 1 else width):
        raise RequestError(
            "unsupported_field", f"best_of: {best_of!r} is neither n nor, in beam search, the number of beams"
        )
    if width == 1:
        return {}
    return {"beam_width": width} | ({} if body.get("temperature") is not None else {"temperature": 0})


def _max_tokens(body: dict, is_chat: bool) -> int | None:
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise RequestError("invalid_value", f"max_tokens: {old!r} contradicts max_completion_tokens: {new!r}")
    given = old if new is None else new
    return COMPLETIONS_MAX_TOKENS if given is None and not is_chat else given


def _chat_logprobs(body: dict) -> int | None:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise RequestError("invalid_type", f"logprobs: {wanted!r} is not true or false")
    if top is not None and not wanted:
        raise RequestError("invalid_value", f"top_logprobs: {top!r} needs logprobs: true")
    return (0 if top is None else top) if wanted else None


def _completion_logprobs(body: dict) -> int | None:
    if body.get("top_logprobs") is not None:
        raise RequestError(
            "invalid_value", "top_logprobs: is for chats; a completion's logprobs is the number itself"
        )
    return body.get("logprobs")


def _list_of(name: str, value) -> tuple:
    if not isinstance(value, list):
        raise RequestError("invalid_type", f"{name}: {value!r} is not a list")
    return tuple(value)


def _logit_bias(value) -> dict[int, float]:
    if not isinstance(value, dict):
        raise RequestError("invalid_type", f"logit_bias: {value!r} is not an object")
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise RequestError("invalid_value", f"logit_bias: {key!r} is not a token id")
    return {int(key): bias for key, bias in value.items()}
