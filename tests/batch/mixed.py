"""A batch as people send them, for the embedded model: shared prefixes, chats, stop strings, several choices, bad rows."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from jaxinfer.batch.rows import CHAT_URL, COMPLETIONS_URL

from .text_tasks import ARROW, HEADER, TASKS, Item, items

BAD = (
    b"{not json",
    b"\xff\xfe",
    b'{"custom_id": "bad-%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": 5}}',
    b'{"custom_id": "bad-%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "n": 0}}',
    b'{"custom_id": "bad-%d", "method": "POST", "url": "/v1/unknown", "body": {"prompt": "x"}}',
    b'{"custom_id": "bad-%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 999999]}}',
    b'{"custom_id": "bad-%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 99999}}',
)
SHOTS = 12
SYSTEM = {"role": "system", "content": HEADER}


@dataclass
class Mixed:
    """An input.

    Attributes:
      lines: one in twenty is bad, one in fifty a duplicate, the others have an answer.
      good: custom_ids of those.
      prefixes: with which several prompts begin; chats share the first messages.
    """

    lines: list[bytes]
    good: set[str]
    prefixes: list[str]


def mixed(count: int, seed: int = 0) -> Mixed:
    draw = random.Random(seed)
    streams = {task: _short(items(task, draw, unseen=False)) for task in TASKS}
    prefixes = {t: HEADER + "\n" + "".join(next(streams[t]).line for _ in range(SHOTS)) for t in TASKS}
    bad, twice = count // 20, count // 50
    rows = {}
    for index in range(count - bad - twice):
        task = draw.choice(list(TASKS))
        url, body = _request(draw, next(streams[task]).question, prefixes[task])
        row = {
            "custom_id": f"{task}-{index}",
            "method": "POST",
            "url": url,
            "body": {"temperature": 0} | body,
        }
        rows[row["custom_id"]] = json.dumps(row).encode()
    lines = [*rows.values(), *draw.sample(list(rows.values()), twice)]
    lines += [BAD[i % len(BAD)].replace(b"%d", b"%d" % i) for i in range(bad)]
    draw.shuffle(lines)
    return Mixed(lines, set(rows), list(prefixes.values()))


def _short(stream: Iterator[Item]) -> Iterator[Item]:
    return (item for item in stream if len(item.answer) <= 45)


def _request(draw: random.Random, question: str, prefix: str) -> tuple[str, dict]:
    kind = draw.random()
    if kind < 0.25:
        body = {"messages": [SYSTEM, {"role": "user", "content": question}], "max_tokens": 40}
        return CHAT_URL, body | ({"logprobs": True, "top_logprobs": 2, "n": 2} if kind < 0.03 else {})
    body = {"prompt": prefix + question + ARROW, "max_tokens": 40}
    if kind < 0.6:
        return COMPLETIONS_URL, body
    if kind < 0.75:
        return COMPLETIONS_URL, body | {"stop": ["\n", " 5", "ab"]}
    if kind < 0.85:  # long answers
        return COMPLETIONS_URL, {"prompt": question + ARROW, "max_tokens": 150, "ignore_eos": True}
    if kind < 0.9:
        return COMPLETIONS_URL, body | {"n": 2, "temperature": 0.7, "seed": draw.randrange(1000)}
    if kind < 0.95:
        return COMPLETIONS_URL, body | {"logprobs": 2}
    return COMPLETIONS_URL, body | {"temperature": 1.0, "top_p": 0.9, "seed": draw.randrange(1000)}
