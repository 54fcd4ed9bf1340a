"""Every field and every error of an input row."""

import json

import pytest

from jaxinfer.batch.rows import CHAT_URL, Row, RowError, parse_row
from jaxinfer.batch.source import Line

from .fake import chat, completion


def parse(row, ignored=None):
    raw = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(Line("rows.jsonl", 7, raw), (ignored if ignored is not None else []).append)


def test_chat_row():
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    row = parse(
        {"custom_id": "x", "method": "POST", "url": CHAT_URL, "body": {"model": "m", "messages": messages}}
    )
    assert isinstance(row, Row)
    assert (row.custom_id, row.model, row.is_chat, row.line.number) == ("x", "m", True, 7)
    assert row.prompt.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
    )
    assert (
        row.sampling.max_tokens is None and row.sampling.temperature == 1.0 and row.sampling.logprobs is None
    )


@pytest.mark.parametrize(
    "prompt, text, ids",
    [
        ("hi", "hi", None),
        (["hi"], "hi", None),
        ([1, 2], None, (1, 2)),
        ([[1, 2]], None, (1, 2)),
        ([5], None, (5,)),
    ],
)
def test_completion_prompts(prompt, text, ids):
    row = parse(completion("x", prompt))
    assert (row.prompt.text, row.prompt.ids, row.prompt.messages) == (text, ids, None)
    assert row.sampling.max_tokens == 16


@pytest.mark.parametrize(
    "body, field, value",
    [
        ({"max_tokens": 5}, "max_tokens", 5),
        ({"max_completion_tokens": 6, "max_tokens": None}, "max_tokens", 6),
        ({"max_completion_tokens": 5, "max_tokens": 5}, "max_tokens", 5),
        ({"min_tokens": 2}, "min_tokens", 2),
        ({"temperature": 0}, "temperature", 0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_k": 40}, "top_k", 40),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"seed": -3}, "seed", -3),
        ({"n": 3}, "n", 3),
        ({"n": 2, "best_of": 2}, "n", 2),
        ({"beam_width": 4}, "beam_width", 4),
        ({"beam_width": 4}, "temperature", 0),
        ({"beam_width": 4, "n": 2, "best_of": 4}, "beam_width", 4),
        ({"use_beam_search": True, "best_of": 4, "n": 2}, "beam_width", 4),
        ({"use_beam_search": True, "n": 3}, "beam_width", 3),
        ({"use_beam_search": True, "n": 3, "temperature": 0}, "n", 3),
        ({"use_beam_search": True}, "beam_width", 1),
        ({"use_beam_search": False, "length_penalty": 1.0}, "beam_width", 1),
        ({"beam_width": 2, "length_penalty": 0.5}, "length_penalty", 0.5),
        ({"beam_width": 2, "early_stopping": "never"}, "early_stopping", "never"),
        ({"stop": "end"}, "stop", ("end",)),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"stop": None}, "stop", ()),
        ({"stop_token_ids": [1, 2]}, "stop_token_ids", (1, 2)),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"presence_penalty": -1}, "presence_penalty", -1),
        ({"frequency_penalty": 1.5}, "frequency_penalty", 1.5),
        ({"repetition_penalty": 1.1}, "repetition_penalty", 1.1),
        ({"logit_bias": {"12": -100, "3": 2.5}}, "logit_bias", {12: -100, 3: 2.5}),
        ({"temperature": None}, "temperature", 1.0),
        ({"response_format": {"type": "text"}, "tools": [], "echo": False}, "n", 1),
    ],
)
@pytest.mark.parametrize("make", [chat, completion])
def test_sampling_fields(make, body, field, value):
    row = parse(make("x", **body))
    assert isinstance(row, Row), row
    assert getattr(row.sampling, field) == value


def test_logprobs_of_both_urls():
    assert parse(chat("x", logprobs=True)).sampling.logprobs == 0
    assert parse(chat("x", logprobs=True, top_logprobs=5)).sampling.logprobs == 5
    assert parse(chat("x", logprobs=False)).sampling.logprobs is None
    assert parse(completion("x", logprobs=3)).sampling.logprobs == 3


def test_unknown_fields_are_ignored_and_named():
    ignored = []
    row = chat("x", user="u", metadata={"a": 1}, store=True, stream=True, shoe_size=43)
    row["body"]["messages"][0]["name"] = "Bob"
    assert isinstance(parse(row | {"note": 1}, ignored), Row)
    assert sorted(ignored) == ["messages.name", "note", "shoe_size", "stream"]


BODY_ERRORS = [
    ({"n": 0}, "invalid_value", "n: 0"),
    ({"n": "2"}, "invalid_type", "n: '2'"),
    ({"temperature": -1}, "invalid_value", "temperature: -1"),
    ({"temperature": 10**400}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"top_p": True}, "invalid_type", "top_p"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": 2.5}, "invalid_type", "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "invalid_value", "contradicts"),
    ({"min_tokens": -1}, "invalid_value", "min_tokens"),
    ({"stop": 5}, "invalid_type", "stop"),
    ({"stop": {"a": 1}}, "invalid_type", "stop"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"stop_token_ids": "5"}, "invalid_type", "stop_token_ids"),
    ({"stop_token_ids": ["5"]}, "invalid_type", "stop_token_ids"),
    ({"ignore_eos": 1}, "invalid_type", "ignore_eos"),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
    ({"logit_bias": {"a": 1}}, "invalid_value", "'a'"),
    ({"logit_bias": {"-1": 1}}, "invalid_value", "'-1'"),
    ({"logit_bias": {"1": "x"}}, "invalid_type", "logit_bias"),
    ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
    ({"model": 5}, "invalid_type", "model"),
    ({"tools": [{"type": "function"}]}, "unsupported_field", "tools"),
    ({"functions": [{}]}, "unsupported_field", "functions"),
    ({"response_format": {"type": "json_object"}}, "unsupported_field", "response_format"),
    ({"suffix": "x"}, "unsupported_field", "suffix"),
    ({"echo": True}, "unsupported_field", "echo"),
    ({"echo": 0}, "unsupported_field", "echo"),
    ({"best_of": 3}, "unsupported_field", "best_of"),
    ({"best_of": 3, "beam_width": 2}, "unsupported_field", "best_of"),
    ({"use_beam_search": 1}, "invalid_type", "use_beam_search"),
    ({"use_beam_search": False, "beam_width": 2}, "invalid_value", "beam_width: 2"),
    ({"beam_width": 0}, "invalid_value", "beam_width: 0"),
    ({"beam_width": "4"}, "invalid_type", "beam_width: '4'"),
    ({"beam_width": 2, "temperature": 0.7}, "invalid_value", "temperature: 0.7"),
    ({"beam_width": 2, "n": 3}, "invalid_value", "n: 3"),
    ({"beam_width": 2, "stop": "x"}, "invalid_value", "stop"),
    ({"length_penalty": 0.5}, "invalid_value", "length_penalty: 0.5"),
    ({"guided_regex": "a*"}, "unsupported_field", "guided_regex"),
]


@pytest.mark.parametrize("body, code, said", BODY_ERRORS)
@pytest.mark.parametrize("make", [chat, completion])
def test_body_errors(make, body, code, said):
    error = parse(make("x", **body))
    assert isinstance(error, RowError)
    assert (error.custom_id, error.code) == ("x", code)
    assert said in error.message and error.message.startswith("rows.jsonl:7: ")


@pytest.mark.parametrize(
    "body, code, said",
    [
        ({"logprobs": 3}, "invalid_type", "logprobs"),
        ({"top_logprobs": 3}, "invalid_value", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "between 0 and 20"),
        ({"prompt": "x"}, "invalid_value", "/v1/completions"),
        ({"messages": []}, "empty_prompt", "messages"),
        ({"messages": None}, "missing_field", "messages"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": ["hi"]}, "invalid_type", "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "'robot'"),
        ({"messages": [{"content": "x"}]}, "invalid_value", "role"),
        ({"messages": [{"role": "user"}]}, "invalid_type", "content"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "unsupported_content", "'x'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "unsupported_content",
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_type", "text"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "unsupported_field",
            "tool_calls",
        ),
    ],
)
def test_chat_errors(body, code, said):
    error = parse(chat("x", **body))
    assert (error.custom_id, error.code) == ("x", code)
    assert said in error.message


@pytest.mark.parametrize(
    "body, code, said",
    [
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"logprobs": 21}, "invalid_value", "logprobs"),
        ({"logprobs": 2, "top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}]}, "invalid_value", "/v1/chat/completions"),
        ({"prompt": None}, "missing_field", "prompt"),
        ({"prompt": ""}, "empty_prompt", "prompt"),
        ({"prompt": []}, "empty_prompt", "prompt"),
        ({"prompt": [""]}, "empty_prompt", "prompt"),
        ({"prompt": ["a", "b"]}, "invalid_value", "2 prompts"),
        ({"prompt": [[1], [2]]}, "invalid_value", "2 prompts"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt"),
        ({"prompt": [1, True]}, "invalid_type", "prompt"),
        ({"prompt": [1, -1]}, "invalid_value", "-1"),
        ({"prompt": [2**31]}, "invalid_value", "2147483648"),
        ({"prompt": {"a": 1}}, "invalid_type", "prompt"),
        ({"prompt": 5}, "invalid_type", "prompt"),
    ],
)
def test_completion_errors(body, code, said):
    error = parse(completion("x", **body))
    assert (error.custom_id, error.code) == ("x", code)
    assert said in error.message


@pytest.mark.parametrize(
    "change, code, custom_id",
    [
        ({"method": "GET"}, "invalid_method", "x"),
        ({"method": None}, "invalid_method", "x"),
        ({"url": "/v1/embeddings"}, "invalid_url", "x"),
        ({"url": ["/v1/completions"]}, "invalid_url", "x"),
        ({"body": "text"}, "invalid_type", "x"),
        ({"custom_id": ""}, "invalid_custom_id", None),
        ({"custom_id": 5}, "invalid_custom_id", None),
        ({"custom_id": None}, "invalid_custom_id", None),
        ({"custom_id": "a\ud800"}, "invalid_encoding", None),
    ],
)
def test_envelope_errors(change, code, custom_id):
    error = parse(chat("x") | change)
    assert (error.code, error.custom_id) == (code, custom_id)


@pytest.mark.parametrize("name", ["custom_id", "url", "body"])
def test_missing_envelope_fields(name):
    row = chat("x")
    del row[name]
    assert f"{name}: is missing" in parse(row).message


@pytest.mark.parametrize(
    "raw, code",
    [
        (b"{", "invalid_json"),
        (b"hello", "invalid_json"),
        (b"[]", "invalid_row"),
        (b"null", "invalid_row"),
        (b"1", "invalid_row"),
        (b"\xff\xfe{\x00}\x00", "invalid_encoding"),
        (b'{"custom_id": "\xff"}', "invalid_encoding"),
        (b'{"custom_id": "a", "custom_id": "b"}', "invalid_json"),
        (b'{"custom_id": NaN}', "invalid_json"),
        (b'{"custom_id": -Infinity}', "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b"[" * 5_000_000, "invalid_json"),
        (b'{"a":' + b"9" * 10_000 + b"}", "invalid_json"),
        (b'{"a": 1}{"b": 2}', "invalid_json"),
        (b'{"a": "\x00"}', "invalid_json"),
    ],
)
def test_bytes_that_are_no_row(raw, code):
    error = parse(raw)
    assert (error.code, error.custom_id) == (code, None)
    assert len(error.message) < 500


def test_half_surrogates_are_refused_and_whole_ones_are_not():
    assert parse(completion("x", "a\ud800b")).code == "invalid_encoding"
    assert parse(completion("x", "a\N{GRINNING FACE}b")).prompt.text == "a\N{GRINNING FACE}b"


def test_long_values_do_not_make_long_messages():
    assert len(parse(completion("x", temperature="y" * 100_000)).message) < 500
