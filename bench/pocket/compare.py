"""The shipped model in transformers and in jaxinfer, both in float32: `python -m bench.pocket.compare --python PYTHON`."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from bench.pocket.evaluate import cases, size_of
from bench.pocket.items import items
from jaxinfer.config import load_config
from jaxinfer.core import SamplingParams
from jaxinfer.llm import EMBEDDED_MODEL, LLM

MOST = 56  # tokens of an answer
LONGEST = 2048  # tokens of a prompt
HUGGING_FACE = EMBEDDED_MODEL.parent / "hugging-face"
SCRIPT = Path(__file__).with_name("transformers_answers.py")


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Token ids of about `count` items, of all tasks and lengths up to LONGEST alike."""
    short = [case for case in cases(None) if case[1] <= LONGEST]
    assert llm.tokenizer is not None
    found = []
    for task, length in short:
        for item in items(task, length, size_of(llm), -(-count // len(short))):
            message = [{"role": "user", "content": item.prompt}]
            found.append(llm.tokenizer.chat(message) if item.chat else llm.tokenizer.encode(item.prompt))
    return found[:count]


def compare(model: Path, hugging_face: Path, python: str, count: int) -> tuple[int, int]:
    """Answers that are the same token by token, and how many were compared."""
    llm = LLM(model, config=load_config(None, ["model.dtype=float32"]))
    asked = prompts(llm, count)
    greedy = SamplingParams(temperature=0, max_tokens=MOST)
    ours = [list(out.token_ids) for out in llm.generate(asked, greedy)]
    told = subprocess.run(
        [python, SCRIPT, hugging_face, str(MOST)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    ends = set(llm.engine.config.eos_ids)
    theirs = json.loads(told.stdout)
    same = sum(_body(a, ends) == _body(b, ends) for a, b in zip(ours, theirs))
    return same, len(asked)


def _body(ids: list[int], ends: set[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in ends else ids


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pocket.compare", description=__doc__)
    parser.add_argument("--python", required=True, help="an interpreter with torch and transformers")
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="converted")
    parser.add_argument("--hugging-face", type=Path, default=HUGGING_FACE, help="the same model")
    parser.add_argument("--items", type=int, default=200)
    options = parser.parse_args(argv)
    same, of = compare(options.model, options.hugging_face, options.python, options.items)
    print(f"{same} of {of} greedy answers are the same")


if __name__ == "__main__":
    main()
