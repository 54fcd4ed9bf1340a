"""Text to token ids and back: transformers' tokenizers, plus what a batch engine needs of single tokens."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.errors import ModelError, RequestError

# Classes that are nothing but tokenizer.json. Loading them directly spares the import of every model's config (0.2 s).
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")
_WORD_START = "\u2581"  # sentencepiece's visible space


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
      vocab_size: number of tokens; ids from here on, of padded embeddings, have no text.

    Raises:
      ModelError: the folder has no tokenizer, or one that cannot be read.
    """

    def __init__(self, folder: str | Path):
        self._hf = _load(Path(folder))
        self._backend = _plain_backend(self._hf)
        self.vocab_size: int = len(self._hf)
        added = self._hf.added_tokens_decoder
        self._added = {token: str(text) for token, text in added.items()}
        self._special = {token for token, text in added.items() if text.special} | set(
            self._hf.all_special_ids
        )
        self._scheme = _decoder_scheme(self._hf)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the model adds, such as a leading beginning-of-sequence.

        Raises:
          RequestError: the text holds half a character (a lone surrogate), which no UTF-8 can spell.
        """
        _check_text("prompt", text)
        return self._ids(text, special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks next; the template adds all special tokens.

        Raises:
          RequestError: the model has no chat template, or its template refuses these messages; or these are no
            messages, or hold half a character.
        """
        if not self._hf.chat_template:
            raise RequestError(
                "no_chat_template", "this model has no chat template; use prompts, not messages"
            )
        _check_messages(messages)
        try:
            text = self._hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            reason = f"{type(error).__name__}: {error}"
            raise RequestError(
                "invalid_messages", f"messages: the model's chat template refuses them: {reason}"
            ) from error
        _check_text("messages", text)
        return self._ids(text, special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a whole sequence, without special tokens."""
        return self._hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def is_special(self, token: int) -> bool:
        """Whether a token is a mark rather than text, such as end-of-sequence."""
        return token in self._special

    def token_text(self, token: int) -> str:
        """Text of one token, its leading space kept; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Bytes of UTF-8 that one token stands for, maybe a part of a character; b"" for ids without text."""
        if token not in self._bytes:
            self._bytes[token] = self._find_bytes(int(token))
        return self._bytes[token]

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self)

    def _ids(self, text: str, *, special_tokens: bool) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=special_tokens).ids
        # Not verbose: the engine says itself what is too long.
        return self._hf.encode(text, add_special_tokens=special_tokens, verbose=False)

    def _find_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._hf.convert_ids_to_tokens(token) if 0 <= token < self.vocab_size else None
        if piece is None:
            return b""
        if self._scheme == "bytes":
            alphabet = _byte_alphabet()
            known = all(char in alphabet for char in piece)
            return bytes(alphabet[char] for char in piece) if known else piece.encode()
        if self._scheme == "pieces":
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes.fromhex(piece[3:5])
            return piece.replace(_WORD_START, " ").encode()
        # Unknown schemes (WordPiece, ...): what the token adds to a text that another token has begun.
        alone, both = self.decode([token]), self.decode([token, token])
        return both.removeprefix(alone).encode()


class Detokenizer:
    """Turns the tokens of one answer into text as they come, never a part of a character.

    The text is that which follows the prompt, so a leading space stays. It equals `Tokenizer.decode` otherwise.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete. Special tokens have none."""
        tokenizer = self._tokenizer
        return self._utf8.decode(
            b"".join(tokenizer.token_bytes(i) for i in ids if not tokenizer.is_special(i))
        )

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character stayed incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a model folder has one: models without still serve token ids."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def _load(folder: Path) -> Any:
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder}: has no tokenizer ({', '.join(_FILES[:3])}, ...); it serves token ids only"
        )
    # transformers would advise, at import, to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if _is_generic(folder):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries underneath raise many kinds, bare Exception among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder}: its tokenizer cannot be read: {reason}") from error


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise RequestError(
            "invalid_prompt",
            f"{name}: {half!r} at character {error.start} is half a character; UTF-8 text is accepted",
        ) from None


def _check_messages(messages: Any) -> None:
    if isinstance(messages, Mapping):
        raise RequestError(
            "invalid_messages",
            "messages: one message where a list of them was expected; wrap one conversation in a list: [messages]",
        )
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(
            "invalid_messages",
            f"messages: expected a list of messages {{role, content}}, not {type(messages).__name__}",
        )


def _is_generic(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    return json.loads(path.read_bytes()).get("tokenizer_class") in _GENERIC


def _plain_backend(hf: Any) -> Any:
    """The `tokenizers.Tokenizer` whose ids are those of `hf.encode`, which takes twice as long; None if there is none."""
    from transformers import PreTrainedTokenizerFast

    own = [getattr(type(hf), name, None) for name in ("encode", "_encode_plus")]
    if own != [PreTrainedTokenizerFast.encode, PreTrainedTokenizerFast._encode_plus]:
        return None  # it does something of its own to the text or the ids
    hf.encode("")  # turns off whatever truncation and padding the file asks for
    return hf.backend_tokenizer


def _decoder_scheme(hf: Any) -> str:
    """How tokens spell text: "bytes" (byte-level BPE), "pieces" (sentencepiece), or "other"."""
    backend = getattr(hf, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return "pieces" if backend is None else "other"
    spelled = decoder.__getstate__().decode()
    if '"ByteLevel"' in spelled:
        return "bytes"
    return "pieces" if _WORD_START in json.dumps(json.loads(spelled), ensure_ascii=False) else "other"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the other bytes for U+0100 on."""
    if not _ALPHABET:
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        _ALPHABET.update({chr(byte): byte for byte in plain})
        _ALPHABET.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return _ALPHABET


_ALPHABET: dict[str, int] = {}
