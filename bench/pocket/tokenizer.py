"""The pocket model's tokenizer: byte-level BPE over text of its own world, digits one by one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from bench.pocket import tasks, words
from bench.pocket.words import Source

CONTEXT = 8192
VOCABULARY = 2048
BOS, EOS, USER, ASSISTANT, SYSTEM = range(5)
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
# Answers begin with a space: a name is then the same tokens as within a text, and can be copied.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|> {{ message.content | trim }}{{ eos_token }}"
    "{% elif message.role in ('user', 'system') %}<|{{ message.role }}|>{{ message.content }}"
    "{% else %}{{ raise_exception('role must be system, user or assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def corpus(documents: int, seed: int) -> Iterator[str]:
    """Texts of all tasks, stories above all, from the names and values that training may use.

    First come syllables by themselves, so that a name begins with a token of a whole syllable, which tells it from others.
    """
    syllables = list(words.syllables())
    for _ in range(documents):
        yield " ".join(f"{s.capitalize()}-{s}" for s in 4 * syllables)
    source = Source(random.Random(f"tokenizer {seed}"))
    kinds = (
        ["plain"] * 8 + ["story"] * 3 + ["table"] * 2 + ["lines", "passkey", "needles", "count", "classify"]
    )
    for index in range(documents):
        document = tasks.make(kinds[index % len(kinds)], source, 700, lambda text: len(text) // 4, 4)
        yield "\n".join([document.context, *(part for turn in document.turns for part in turn[:2])])


def train(documents: int = 6000, seed: int = 0, vocabulary: int = VOCABULARY) -> Tokenizer:
    """The same tokenizer for the same arguments."""
    tokenizer = Tokenizer(BPE())
    split = Split(Regex(r" ?[A-Za-z_]+|[0-9]| ?[^\sA-Za-z0-9_]+|\s"), "isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(documents, seed), trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
