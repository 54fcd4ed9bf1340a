"""Text and tokens, for byte-level BPE and sentencepiece-like tokenizers built here, and real ones where present."""

import json
import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import (
    Tokenizer as Backend,
)
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from jaxinfer.errors import ModelError, RequestError
from jaxinfer.models.tokenizer import Tokenizer, has_tokenizer

TEXTS = [
    "Once upon a time, there was a wörld of 😀 and 世界.",
    "two  spaces\n\tand a tab ",
    "the theme of them",
] * 4
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"


def save(folder, backend, **settings):
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    } | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def byte_level(folder, **settings):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return save(folder, backend, **settings)


def sentencepiece(folder, **settings):
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz.,"]
    backend = Backend(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return save(folder, backend, **settings)


@pytest.fixture(scope="module", params=[byte_level, sentencepiece], ids=["bytes", "pieces"])
def tokenizer(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("tokenizer"), chat_template=TEMPLATE)


ADDED = ["<s>", "</s>", "<tool>"]


def stream(tokenizer, ids):
    detokenizer = tokenizer.detokenizer()
    return [detokenizer.feed([token]) for token in ids], detokenizer.finish()


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60))
def test_streamed_text_is_the_text(tokenizer, text):
    assume(not any(added in text for added in ADDED))
    ids = tokenizer.encode(text)
    fed, rest = stream(tokenizer, ids)
    assert rest == ""
    assert "".join(fed) in (text, " " + text)  # sentencepiece begins every text with a space
    assert tokenizer.decode(ids) == text
    spelled = b"".join(tokenizer.token_bytes(token) for token in ids if not tokenizer.is_special(token))
    assert spelled.decode() == "".join(fed)


def test_characters_come_whole(tokenizer):
    fed, _ = stream(tokenizer, tokenizer.encode("😀世"))
    assert [text for text in fed if text.strip()] == ["😀", "世"]


def test_a_character_cut_off_shows_at_the_end(tokenizer):
    ids = tokenizer.encode("a😀")[:-1]
    fed, rest = stream(tokenizer, ids)
    assert "".join(fed).strip() == "a"
    assert rest == "\ufffd"
    assert tokenizer.token_text(ids[-1]) == "\ufffd"


def test_leading_spaces_are_kept_in_single_tokens(tokenizer):
    first = tokenizer.encode(" a")[1:]
    assert "".join(tokenizer.token_text(token) for token in first).endswith(" a")


def test_special_tokens_have_bytes_but_no_text(tokenizer):
    bos = tokenizer.encode("")[0]
    assert tokenizer.is_special(bos)
    assert tokenizer.token_bytes(bos) == b"<s>"
    assert stream(tokenizer, [bos]) == ([""], "")


def test_added_tokens_that_are_text_stay_text(tokenizer):
    ids = tokenizer.encode("<tool>")
    assert "".join(stream(tokenizer, ids)[0]).strip() == "<tool>"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    assert tokenizer.vocab_size == max(tokenizer.encode("<tool>")) + 1
    for token in (tokenizer.vocab_size, 10**6):
        assert tokenizer.token_bytes(token) == b""
        assert tokenizer.decode([token]) == ""


def test_chat_renders_the_template_with_one_beginning(tokenizer):
    ids = tokenizer.chat([{"role": "user", "content": "hello"}])
    bos = tokenizer.encode("")[0]
    assert ids.count(bos) == 1
    assert "".join(stream(tokenizer, ids)[0]).strip().endswith("hello[a]")


@given(
    pieces=st.lists(
        st.sampled_from(ADDED) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
        max_size=9,
    )
)
def test_ids_are_those_of_transformers(tokenizer, pieces):
    text = "".join(pieces)
    assert tokenizer.encode(text) == tokenizer._hf.encode(text)


@pytest.mark.parametrize(
    "settings", [{}, {"split_special_tokens": True}, {"add_prefix_space": True}], ids=str
)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_ids_are_those_of_transformers_whatever_the_files_ask_for(tmp_path, make, settings):
    """Transformers ignores truncation and padding of the file unless a call asks for them."""
    make(tmp_path, chat_template=TEMPLATE)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=50)
    tokenizer = save(tmp_path, backend, chat_template=TEMPLATE, **settings)
    fresh = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("", "a", "the theme of<tool> them </s>, the theme", "x" * 100):
        assert tokenizer.encode(text) == fresh.encode(text)
        messages = [{"role": "user", "content": text}]
        rendered = fresh.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.chat(messages) == fresh.encode(rendered, add_special_tokens=False)


def test_a_tokenizer_with_a_way_of_its_own_keeps_it(tmp_path, monkeypatch):
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(text.upper(), *args, **kwargs)

    byte_level(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", Shouting.from_pretrained)
    tokenizer = Tokenizer(tmp_path)
    monkeypatch.undo()
    assert tokenizer.decode(tokenizer.encode("hello")) == "HELLO"


def test_long_texts_are_not_warned_about(tmp_path):
    """The engine says itself which rows are too long; transformers would print the first of them only."""
    code = (
        "import sys; from jaxinfer.models.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer(sys.argv[1])\n"
        "print(len(tokenizer.encode('x' * 100)), len(tokenizer.chat([{'role': 'user', 'content': 'x' * 100}])))\n"
        "print('now:', file=sys.stderr)\n"
        "tokenizer._hf.encode('x' * 100)"
    )
    byte_level(tmp_path, chat_template=TEMPLATE, model_max_length=10)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    assert all(int(count) > 100 for count in done.stdout.split())
    assert done.stderr.startswith("now:\n")
    assert "longer than the specified maximum" in done.stderr  # asked plainly, transformers does warn


def test_chat_says_what_is_wrong(tmp_path):
    with pytest.raises(RequestError, match="no chat template") as caught:
        byte_level(tmp_path).chat([{"role": "user", "content": "hello"}])
    assert caught.value.code == "no_chat_template"
    picky = byte_level(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match=r"refuses them: .*roles must alternate"):
        picky.chat([{"role": "user", "content": "hello"}])


def test_folders_without_a_tokenizer_or_with_a_broken_one(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        Tokenizer(tmp_path)


def test_importing_the_module_does_not_import_transformers():
    code = "import sys, jaxinfer.models.tokenizer; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_real_tokenizers(tmp_path, shared_data):
    for name in ("stories260K", "babyllama105"):
        folder = shared_data(f"checkpoints/{name}")
        tokenizer = Tokenizer(folder)
        for case in json.loads((folder / "reference.json").read_text())["cases"]:
            assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
            fed, rest = stream(tokenizer, case["greedy_ids"])
            assert ("".join(fed) + rest).strip() == case["greedy_text"].strip()
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes(shared_data(f"tokenizers/gpt2/{file}").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    text = "Hello, wörld 😀!"
    tokenizer = Tokenizer(tmp_path)
    assert "".join(stream(tokenizer, tokenizer.encode(text))[0]) == text
