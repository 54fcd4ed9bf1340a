"""jaxinfer-convert --quant: what is stored, that it goes on where it was stopped, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from folders import random_tensors, write_folder

from convert import quantize
from convert.cli import main
from convert.convert import convert
from convert.quantize import Quantize
from jaxinfer import LLM, SamplingParams, load_config
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.memory import weight_bytes
from jaxinfer.errors import ConfigError, ModelError
from jaxinfer.models.checkpoint import load_model, read_manifest
from jaxinfer.models.tokenizer import Tokenizer
from jaxinfer.quant.form import quantization
from jaxinfer.quant.matrices import round_matrix
from jaxinfer.quant.model import quantize_model
from jaxinfer.quant.text import encode, windows

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "dtype": "float32",
}
WORDS = {"<unk>": 0} | {f"w{i}": i for i in range(1, 64)}
TOKENIZER = {
    "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<unk>"},
    "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [],
}
PROMPTS = [[5, 9, 3], list(range(1, 40)), [7]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = {name: 0.2 * tensor for name, tensor in random_tensors(CONFIG).items()}
    folder = write_folder(tmp_path_factory.mktemp("quantize") / "source", tensors, CONFIG)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


@pytest.fixture(scope="module")
def text(source):
    path = source.parent / "text.txt"
    draw = np.random.default_rng(0)
    path.write_text(" ".join(f"w{i}" for i in draw.integers(1, 64, 400)))
    return path


@pytest.fixture(scope="module")
def converted(source, text):
    """atom-w4a8, with the report of each layer."""
    reports = []
    convert(source, source.parent / "w4a8", quantize=Quantize("atom-w4a8", {}, text, reports.append))
    return source.parent / "w4a8", reports


def texts_of(llm):
    return [list(out.token_ids) for out in llm.generate(PROMPTS, GREEDY)]


def test_a_stored_model_is_the_one_that_was_quantized(source, text, converted):
    folder, reports = converted
    assert [report.index for report in reports] == [0, 1]
    assert all(matrix.error < 0.3 for report in reports for matrix in report.matrices)
    convert(source, source.parent / "plain", overwrite=True)
    config, model = load_model(source.parent / "plain", layout="unstacked")
    form = quantization("atom-w4a8", config)
    made = windows(encode(text.read_text(), Tokenizer(source).encode), form, config.context_length)
    quantized_config, want, _ = quantize_model(model, config, form, made)
    stored_config, got = load_model(folder, layout="unstacked")
    assert stored_config == quantized_config
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(got)) == weight_bytes(stored_config, "float32")
    settings = load_config(None, ["engine.max_seqs=4"])
    engine = Engine(quantized_config, want, settings)
    llm = LLM(folder, config=load_config(None, ["engine.max_seqs=4", "quantization.mode=atom-w4a8"]))
    first = texts_of(llm)
    llm.engine = engine
    assert texts_of(llm) == first


def test_log_probabilities_of_beams_are_those_of_their_answers(converted):
    llm = LLM(converted[0], config=load_config(None, ["engine.max_seqs=4"]))
    sampling = SamplingParams(temperature=0, max_tokens=6, beam_width=3, n=3, logprobs=1)
    for prompt, out in zip(PROMPTS, list(llm.generate(PROMPTS, sampling)), strict=True):
        ids = llm.prompt_ids(prompt).tolist()
        sums = []
        for choice in out.choices:
            scores = llm.score([*ids, *choice.token_ids])[len(ids) - 1 :]
            np.testing.assert_allclose([each.logprob for each in choice.logprobs], scores, atol=1e-4)
            sums.append(scores.mean())
        assert len(sums) == 3 and sums == sorted(sums, reverse=True)


def test_every_piece_names_its_type_and_the_report_is_there(converted):
    folder, _ = converted
    manifest = json.loads((folder / "jaxinfer.json").read_text())
    assert manifest["format"] == 2 and manifest["quantization"]["mode"] == "atom-w4a8"
    assert {p["dtype"] for part in manifest["parts"] for p in part["pieces"]} == {
        "float32",
        "uint8",
        "int8",
        "int32",
    }
    rows = json.loads((folder / "quantization-report.json").read_text())
    assert [len(row["matrices"]) for row in rows] == [2 + 2 * 4] * 2
    assert (folder / "quantization-report.svg").read_text().startswith("<svg")
    assert not list(folder.parent.glob(".w4a8*"))


def test_a_stopped_run_goes_on(source, text, tmp_path, monkeypatch):
    """To the same bits as one that was not stopped, also where norms are stored in fewer of them than they are kept in."""

    def stop(report):
        raise KeyboardInterrupt

    def run(name, told=lambda report: None):
        quantize = Quantize("atom-w4a8", {}, text, told)
        return convert(source, tmp_path / name, dtype="bfloat16", quantize=quantize)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("out", stop)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.quantizing").glob("layer-*"))) == 1
    rounded = []
    monkeypatch.setattr(
        "jaxinfer.quant.calibrate.round_matrix", lambda *args: rounded.append(args) or round_matrix(*args)
    )
    assert run("out").fingerprint == whole.fingerprint
    assert len(rounded) == 2 + 2 * 4  # of the second layer
    (_, one), (_, other) = load_model(tmp_path / "out"), load_model(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_layers_of_another_model_form_or_text_are_not_taken_over(source, converted, tmp_path):
    shop = [tmp_path / "out", source, ("model.safetensors",)]
    config = read_manifest(converted[0]).config
    other = dataclasses.replace(config, quantization=quantization("atom-w4a4", config))
    text = np.zeros((1, 4), np.int32)
    for changed in (other, dataclasses.replace(config, norm_eps=1e-3), config):
        for sample, kept in ((text, 0), (text, 1), (text + 1, 0)):
            made = quantize.Workshop(*shop, changed, sample)
            assert made.finished == kept
            (made.folder / "layer-00000.npz").touch()


def test_another_mode_is_refused(converted):
    with pytest.raises(ModelError, match=r"quantization is atom-w4a8, .* asks for w8a8"):
        LLM(converted[0], config=load_config(None, ["quantization.mode=w8a8"]))


def test_the_command(source, text, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "out"), "--quant", "w8a8"]) == 0
    printed = capsys.readouterr().out
    assert "relative output error" in printed and "quantization-report.svg" in printed
    for extra, message in (
        (["--quant", "atom-w4a4"], "needs --calibration FILE"),
        (["--calibration", str(text)], "--calibration and --set are for --quant"),
        (["--quant", "atom-w4a4", "--calibration", str(tmp_path / "none")], "cannot be read"),
        (["--quant", "w8a8", "--set", "quantization.group=7"], "quantization.group = 7"),
    ):
        assert main([str(source), str(tmp_path / "bad"), *extra]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("w1 w2")
    command = [str(source), str(tmp_path / "bad"), "--quant", "atom-w4a4", "--calibration"]
    assert main([*command, str(tmp_path / "short.txt")]) == 2
    assert "2 tokens; at least 64" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_a_real_checkpoint_says_nearly_the_same(tmp_path, shared_data):
    source, text = shared_data("checkpoints/babyllama105"), shared_data("text/tinystories_197k.txt")
    told = text.read_text()
    convert(source, tmp_path / "plain")
    (tmp_path / "text.txt").write_text(told[:4096])
    convert(source, tmp_path / "packed", quantize=Quantize("atom-w4a8", {}, tmp_path / "text.txt"))
    plain, packed = (
        -np.mean(LLM(tmp_path / name, config=load_config(None, ["engine.max_seqs=1"])).score(told[-250:]))
        for name in ("plain", "packed")
    )
    assert packed < 1.02 * plain


def test_weights_that_are_no_numbers_are_named(source, text, tmp_path):
    tensors = random_tensors(CONFIG)
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = np.inf
    broken = write_folder(tmp_path / "source", tensors, CONFIG)
    with pytest.raises(ModelError, match=r"layers\.1\.attention\.out: holds NaN or infinite"):
        convert(broken, tmp_path / "out", quantize=Quantize("w8a8"))
    with pytest.raises(ConfigError, match="has no tokenizer"):
        convert(broken, tmp_path / "out", quantize=Quantize("atom-w4a8", {}, text))
