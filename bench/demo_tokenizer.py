"""The embedded model's tokenizer: bytes, and a few words that its tasks use all the time."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing

from jaxinfer.demo_tasks import ARROW, NAMES, PLACES, TASKS, THINGS

BOS, END = 0, 1
SPECIAL = ("<s>", "\n")  # the end of a line ends an answer
INNER = (
    *NAMES,
    *THINGS,
    *PLACES,
    "put",
    "the",
    "in",
    "Where",
    "is",
    "Who",
    "What",
    "there",
    "by",
)  # words after a space
WORDS = (*TASKS, ARROW, *(f" {word}" for word in INNER))
DIGITS = tuple(f" {digit}" for digit in range(10))

# Roles beyond the user's are lines of their own; the assistant's turn follows the arrow.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ message.content | trim }} ->"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}\n"
    "{% elif message.role == 'system' %}{{ message.content | trim }}\n"
    "{% else %}{{ raise_exception('role must be system, user or assistant') }}{% endif %}{% endfor %}"
)


def save_tokenizer(folder: Path, context: int) -> Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json.

    Words of the vocabulary are one token each; everything else is bytes, digits with the space before them.
    """
    # 0xC0, 0xC1 and 0xF5 on never occur in UTF-8; the newline is the end token
    letters = sorted(c for c in ByteLevel.alphabet() if c not in "ĊÀÁõö÷øùúûüýþÿ")
    pieces = [*SPECIAL, *letters, *(word.replace(" ", "Ġ") for word in (*WORDS, *DIGITS))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab, [], ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    split = Split(Regex(r" ?[0-9]| ?[A-Za-z]+| ->|[^A-Za-z0-9]"), "isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[END],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    return tokenizer
