"""One raw line of a batch file -> a Row that the engine can serve, or a RowError that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from jaxinfer.batch.body import Prompt, parse_prompt, parse_sampling, refuse_unsupported
from jaxinfer.batch.source import Line
from jaxinfer.core import SamplingParams
from jaxinfer.errors import RequestError

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"

_MAX_MESSAGE = 400
_ROW_FIELDS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, slots=True)
class Row:
    """One valid request of a batch file.

    Attributes:
      line: where it stands.
      prompt: text, token ids, or chat messages.
      model: the model its body asks for, if any.
    """

    line: Line
    custom_id: str
    url: str
    prompt: Prompt
    sampling: SamplingParams
    model: str | None

    @property
    def is_chat(self) -> bool:
        return self.url == CHAT_URL


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a line cannot be answered. `custom_id` is None where the line has no usable one."""

    line: Line
    custom_id: str | None
    code: str
    message: str


def parse_row(line: Line, ignored: Callable[[str], None]) -> Row | RowError:
    """Never raises for anything that a line may hold. `ignored` hears the name of every field that has no effect."""
    custom_id = None
    try:
        fields = _read_json(line)
        custom_id = _usable_id(fields)
        return _parse_fields(line, fields, ignored)
    except RequestError as error:
        return row_error(line, custom_id, error)
    except RecursionError:
        return row_error(line, custom_id, RequestError("invalid_json", "the JSON is nested too deeply"))


def row_error(line: Line, custom_id: str | None, error: RequestError) -> RowError:
    message = f"{line.file}:{line.number}: {error.message}"
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + "..."
    return RowError(line, custom_id, error.code, message.encode("utf-8", "replace").decode())


def _read_json(line: Line) -> dict:
    if line.problem:
        raise line.problem
    try:
        text = line.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            "invalid_encoding", f"the line is not UTF-8: {error.reason} at byte {error.start}"
        ) from None
    try:
        value = _STRICT_JSON.decode(text)
    except ValueError as error:
        raise RequestError("invalid_json", f"the line is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("invalid_row", f"the line is a JSON {_json_name(value)}, not an object")
    return value


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError("invalid_json", f"the key {twice!r} appears twice in one object")
    return value


def _no_constant(name: str):
    raise RequestError("invalid_json", f"{name} is not JSON; numbers must be finite")


_STRICT_JSON = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _usable_id(fields: dict) -> str | None:
    custom_id = fields.get("custom_id")
    return custom_id if isinstance(custom_id, str) and custom_id and _is_unicode(custom_id) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_fields(line: Line, fields: dict, ignored: Callable[[str], None]) -> Row:
    escaped = (
        b"\\ud" in line.raw or b"\\uD" in line.raw
    )  # raw UTF-8 cannot hold a lone surrogate, an escape can
    if escaped and not _is_unicode(json.dumps(fields, ensure_ascii=False)):
        raise RequestError(
            "invalid_encoding", "a string holds half of a surrogate pair, which is not a character"
        )
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError(
            "invalid_custom_id", f"custom_id: {_shown(fields, 'custom_id')}; a non-empty string is needed"
        )
    if fields.get("method", "POST") != "POST":
        raise RequestError("invalid_method", f'method: {_shown(fields, "method")}; only "POST" is accepted')
    url = fields.get("url")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise RequestError(
            "invalid_url", f"url: {_shown(fields, 'url')}; accepted are {CHAT_URL} and {COMPLETIONS_URL}"
        )
    body = fields.get("body")
    if not isinstance(body, dict):
        raise RequestError("invalid_type", f"body: {_shown(fields, 'body')}; an object is needed")
    for name in fields:
        if name not in _ROW_FIELDS:
            ignored(name)
    return _parse_body(line, custom_id, url, body, ignored)


def _parse_body(line: Line, custom_id: str, url: str, body: dict, ignored: Callable[[str], None]) -> Row:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("invalid_type", f"model: {model!r} is not a string")
    is_chat = url == CHAT_URL
    refuse_unsupported(body, is_chat, ignored)
    prompt = parse_prompt(body, is_chat, ignored)
    return Row(line, custom_id, url, prompt, parse_sampling(body, is_chat), model)


def _shown(fields: dict, name: str) -> str:
    return f"{fields[name]!r}" if name in fields else "is missing"


def _json_name(value) -> str:
    names = {
        list: "array",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names[type(value)]
