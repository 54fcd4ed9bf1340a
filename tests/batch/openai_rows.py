"""Whether output rows are what OpenAI's own client reads."""

import pytest

types = pytest.importorskip("openai.types")
chats = pytest.importorskip("openai.types.chat")
batches = pytest.importorskip("openai.types.batch_error")


def check_output_row(row):
    """Asserts that it is an answer or an error in OpenAI's form, with every field known and of the right type."""
    assert row.keys() == {"id", "custom_id", "response", "error"} and row["id"].startswith("batch_req_")
    if row["error"] is not None:
        error = batches.BatchError.model_validate(row["error"], strict=True)
        assert row["response"] is None and error.code and error.message and error.line >= 1
        assert_known(error)
        return
    response = row["response"]
    assert response.keys() == {"status_code", "request_id", "body"} and response["status_code"] == 200
    body = response["body"]
    kind = {"chat.completion": chats.ChatCompletion, "text_completion": types.Completion}[body["object"]]
    parsed = kind.model_validate(body, strict=True)
    assert_known(parsed)
    assert [choice.index for choice in parsed.choices] == list(range(len(parsed.choices))) != []
    usage = parsed.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def assert_known(value):
    """No field, at any depth, that the client has no name for."""
    if isinstance(value, list):
        for each in value:
            assert_known(each)
    elif hasattr(value, "model_extra"):
        assert not value.model_extra, value.model_extra
        for name in type(value).model_fields:
            assert_known(getattr(value, name))
