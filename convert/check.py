"""Checks a checkpoint against the description of its model before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from convert.reader import SourceTensor
from jaxinfer.errors import ModelError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.tensors import TensorSpec, ignored
from jaxinfer.models.tokenizer import Tokenizer, has_tokenizer

STORABLE = ("float32", "bfloat16", "float16", "float64")
NAMED = 8  # problems of one kind that a message lists


def check_tensors(
    source: Path, tensors: Mapping[str, SourceTensor], specs: tuple[TensorSpec, ...], config: ModelConfig
) -> None:
    """Every tensor of the table must be there, in its shape, as floating-point numbers; and no other.

    Raises:
      ModelError: lists all that are missing, extra, misshapen or of another type.
    """
    wanted = {spec.name: spec.shape for spec in specs}
    both = [name for name in wanted if name in tensors]
    problems = {
        "missing": [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in tensors],
        "unknown": [name for name in tensors if name not in wanted and not ignored(name, config)],
        "misshapen": [
            f"{name} is {list(tensors[name].shape)}, should be {list(wanted[name])}"
            for name in both
            if tensors[name].shape != wanted[name]
        ],
        "not floating-point": [
            f"{name} is {tensors[name].dtype}" for name in both if tensors[name].dtype.name not in STORABLE
        ],
    }
    found = [_list(kind, names) for kind, names in problems.items() if names]
    if found:
        raise ModelError(f"{source}: tensors do not match a {config.family} model: {'; '.join(found)}")


def _list(kind: str, names: list[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} {kind}: {', '.join(names[:NAMED])}{more}"


def check_vocabulary(source: Path, config: ModelConfig) -> None:
    """Every token of the tokenizer needs a row of the embedding. (More rows than tokens are common: padding.)

    Raises:
      ModelError: the tokenizer is larger, or its file is corrupt.
    """
    path = source / "tokenizer.json"
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_bytes())
        vocabulary, added = data["model"]["vocab"], data.get("added_tokens") or ()
        # Unigram tokenizers list [token, score] pairs in the order of their ids; the others map tokens to ids.
        ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        size = 1 + max((*ids, *(token["id"] for token in added)), default=-1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: is not a tokenizer file: {type(error).__name__}: {error}") from error
    _check_size(source, size, config)


def check_tokenizer(source: Path, converted: Path, config: ModelConfig) -> None:
    """The tokenizer as it will be loaded from the converted folder, of whatever kind it is; none is accepted too.

    Raises:
      ModelError: it cannot be loaded, or is larger than the embedding.
    """
    if not has_tokenizer(converted):
        return
    try:
        tokenizer = Tokenizer(converted)
    except ModelError as error:
        reason = str(error).removeprefix(f"{converted}: ")
        raise ModelError(f"{source}: {reason}; mend its tokenizer files, or remove them") from error
    _check_size(source, tokenizer.vocab_size, config)


def _check_size(source: Path, size: int, config: ModelConfig) -> None:
    if size > config.vocab_size:
        raise ModelError(
            f"{source}: the tokenizer has {size} tokens, the embedding only {config.vocab_size} rows (vocab_size)"
        )
