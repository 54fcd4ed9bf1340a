"""`python -m jaxinfer.popularity`: how often texts visit each expert of a model, the profile that `offload.popularity` reads."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxinfer.config import load_config
from jaxinfer.errors import ConfigError, JaxInferError, RequestError
from jaxinfer.llm import LLM

WINDOW = 2048  # tokens that a text is cut into, where the engine's context is not shorter


def count_visits(llm: LLM, text: str) -> tuple[np.ndarray, int]:
    """Visits of each expert, int [L, E] of the layers that have some, and tokens of the text.

    Args:
      llm: a model whose experts are offloaded; who computes them, and where, does not matter.

    Raises:
      ConfigError: its experts are not offloaded.
      RequestError: the model has no tokenizer.
    """
    offload = llm.engine.offload
    if offload is None:
        raise ConfigError(
            "offload.device_memory is not set: visits are counted where experts are offloaded; "
            'give the model less than all of the device, such as --set offload.device_memory="24GiB"'
        )
    ids, window = llm.prompt_ids(text), min(WINDOW, llm.engine.memory.context)
    before = offload.visits()
    llm.score([ids[start : start + window] for start in range(0, len(ids), window)])
    return offload.visits() - before, len(ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for wrong usage, or a model or a text that cannot be used."""
    options = _parser().parse_args(argv)
    try:
        texts = {str(path): _read(path) for path in options.text}
        llm = LLM(options.model, config=load_config(options.config, options.set))
        profile = {}
        for name, text in texts.items():
            try:
                counts, tokens = count_visits(llm, text)
            except RequestError as error:
                raise ConfigError(f"{name}: {error}") from None
            profile[name] = {"tokens": tokens, "counts": counts.tolist()}
        _write(options.output, json.dumps({"model": llm.model_fingerprint, "texts": profile}) + "\n")
    except JaxInferError as error:
        print(f"jaxinfer.popularity: {error}", file=sys.stderr)
        return 2
    for name, entry in profile.items():
        shares = np.array(entry["counts"], float)
        shares /= shares.sum(axis=1, keepdims=True)
        print(
            f"{name}: {entry['tokens']} tokens; of a layer's visits its experts take {shares.min():.1%} to {shares.max():.1%}"
        )
    return 0


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    if not text.strip():
        raise ConfigError(f"{path}: is empty; expected text such as the model will be given")
    return text


def _write(path: Path, content: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(content)
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxinfer.popularity", description=__doc__)
    parser.add_argument(
        "text", type=Path, nargs="+", help="text files; each weighs the same, however long it is"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--model", metavar="PATH", help="a converted model; the embedded one otherwise")
    parser.add_argument("--config", type=Path, metavar="FILE.toml")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
