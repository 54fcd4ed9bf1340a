"""Whatever a line holds, it becomes a request or an error row; nothing is raised and nothing is lost."""

import copy
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer import LLM
from jaxinfer.batch.identity import Identifier
from jaxinfer.batch.output import refused_row
from jaxinfer.batch.rows import CHAT_URL, Row, parse_row
from jaxinfer.batch.source import Line
from jaxinfer.errors import RETRIED

from .fake import FakeLLM, chat, completion
from .openai_rows import check_output_row
from .test_command import read_rows, run

SEED = 20250101
ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, "", "x", "\ud800", "\udfff\ud800", "\0", "\u2028",
    "𝒳" * 50, [], [[]], [None], {}, {"": None}, {"type": "text"}, [{"type": "text", "text": "a"}], ["a", "b"], [1, 2],
    {"1": 5}, {"١": 1}, "NaN", [[[[[]]]]],
]  # fmt: skip
NAMES = [
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k",
    "min_p", "seed", "n", "stop", "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "tools", "response_format", "echo", "best_of", "stream", "user",
]  # fmt: skip
BYTES = [b"NaN", b"Infinity", b"-", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b"\x00", b'"', b"{", b"}",
         b"[" * 3000, b'{"a":' * 2000, b"1e999", b"9" * 5000, b"\\", b",", b":", b"\r", b"null", b"\xf0\x9f\x98\x80"]  # fmt: skip

# Values that json.dumps cannot write, or only as something else.
RAW = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"-0", b"-0.0", b"1E400", b"9" * 4301, b"1." + b"0" * 400, b"\"\\ud800\"",
    b"\"\\udc00\\ud800\"", b"\"\\ud83d\\ude00\"", b"\"\\u0000\"", b"\"\t\"", b"[" * 400 + b"]" * 400, b"[" * 90_000 + b"]" * 90_000,
    b'{"a":' * 300 + b"1" + b"}" * 300, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b'{"a":1,"a":2}', b'[{"role":"user","role":"user"}]',
]  # fmt: skip
LARGE = [
    b'"' + b"x" * 300_000 + b'"', b'"' + b"\\ud83d\\ude00" * 20_000 + b'"', b"[" + b"1," * 50_000 + b"1]", b"[" + b'"s",' * 20_000 + b'"s"]',
    b"[" + b'{"role":"user","content":"a"},' * 5_000 + b'{"role":"user","content":"a"}]',
    b"{" + b",".join(b'"%d":1' % token for token in range(20_000)) + b"}",
]  # fmt: skip
PLACE = "@@raw@@"  # stands for one of them until the row is written
FIELDS = [
    "custom_id",
    "method",
    "url",
    "body",
    "prompt",
    "messages",
    "role",
    "content",
    "max_tokens",
    "extra",
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def mutated(dice, number):
    """A line that was a good row before one to three things went wrong with it."""
    row = dice.choice([chat, completion])(f"row-{number}")
    for _ in range(dice.randint(1, 3)):
        kind, odd = dice.randrange(5), PLACE if dice.random() < 0.2 else copy.deepcopy(dice.choice(ODD))
        if kind == 0:
            row[dice.choice([*row, "extra"])] = odd
        elif kind == 1 and row:
            del row[dice.choice([*row])]
        elif isinstance(row.get("body"), dict):
            body = row["body"]
            target = (
                body["messages"][0]
                if kind == 2 and isinstance(body.get("messages"), list) and body["messages"]
                else body
            )
            if isinstance(target, dict):
                target[dice.choice(["role", "content", "name"] if target is not body else NAMES)] = odd
    raw = json.dumps(row, ensure_ascii=dice.random() < 0.7).encode("utf-8", "surrogatepass")
    raw = raw.replace(b'"' + PLACE.encode() + b'"', dice.choice(LARGE if dice.random() < 0.01 else RAW))
    if dice.random() < 0.05:  # a key twice, with the same value or another
        key = b'"%s": ' % dice.choice(FIELDS).encode()
        raw = raw.replace(key, key + dice.choice([b'"row-1"', b"1", b"null", b"{}"]) + b", " + key, 1)
    if dice.random() < 0.4:
        at = dice.randrange(len(raw) + 1)
        end = min(len(raw), at + dice.choice([0, 0, 1, 5, 1000]))
        raw = raw[:at] + dice.choice(BYTES) + raw[end:]
    return raw.replace(b"\n", b"").strip() or b"{"


def check(raw):
    identified = Identifier(b"run", lambda name: None).identify(Line("fuzz", 1, raw))
    if isinstance(identified.row, Row):
        row = identified.row
        assert row.custom_id and row.sampling.n >= 1
        assert sum(part is not None for part in (row.prompt.text, row.prompt.ids, row.prompt.messages)) == 1
        json.dumps(row.custom_id).encode()
    else:
        line = refused_row(identified.key, identified.row)
        assert len(json.loads(line)["error"]["message"]) < 500 and line.count(b"\n") == 1


@settings(max_examples=300, derandomize=True, deadline=None)
@given(json_values)
def test_any_json(value):
    check(json.dumps(value).encode())


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.sampled_from(NAMES), json_values, st.sampled_from([chat, completion]))
def test_any_value_of_any_field(name, value, make):
    check(json.dumps(make("x", **{name: value})).encode())


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(raw):
    check(raw)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(json_values)
def test_any_messages(value):
    body = {"messages": [{"role": "user", "content": value}]}
    check(json.dumps({"custom_id": "x", "method": "POST", "url": CHAT_URL, "body": body}).encode())


@pytest.mark.parametrize(
    "count, load",
    [
        (10_000, FakeLLM),
        pytest.param(100_000, FakeLLM, marks=pytest.mark.slow),
        pytest.param(10_000, LLM, marks=pytest.mark.slow),
    ],
    ids=["fake-10000", "fake-100000", "real-10000"],
)
def test_a_file_of_mutated_rows(tmp_path, count, load, capfd):
    dice, model = random.Random(SEED), load()
    lines = [mutated(dice, number) for number in range(count)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_bytes(b"\n".join(lines) + b"\n")
    assert run("-i", source, "-o", out, "--quiet", model=model) == 1
    assert capfd.readouterr().err == ""
    rows = read_rows(out)
    assert len(rows) == count and len({row["id"] for row in rows}) == count
    for row in rows:
        check_output_row(row)
    good = sum(isinstance(parse_row(Line("fuzz", 1, raw), lambda name: None), Row) for raw in lines)
    answered = [row for row in rows if row["error"] is None]
    # Beyond what parsing refuses: an empty text of a template, a custom_id that another mutated row has as well.
    assert count // 50 < good and good - count // 100 <= len(answered) <= good
    assert not {row["error"]["code"] for row in rows if row["error"]} & RETRIED
    assert run("-i", source, "-o", out, "--quiet", model=model) == 1
    assert len(read_rows(out)) == count
