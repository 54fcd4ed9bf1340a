"""Conversion streams: its peak memory stays below twice the largest tensor, whatever the model. Writes up to 8 GB."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_quantize import TOKENIZER

from jaxinfer.models import tensor_table
from jaxinfer.models.families import from_hugging_face

MIB = 1 << 20
COMMON = {
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
MODELS = {
    # Experts that are many times the largest tensor (the embedding) when stacked.
    "mixtral": {
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
    },
    # Gate and up, fused, are twice the largest tensor (either of them).
    "llama": {
        "vocab_size": 8192,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    # Many small experts.
    "olmoe": {
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
}

# Memory beyond that of an interpreter which has everything imported and has converted a small model.
MEASURED = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from convert.convert import convert
from convert.quantize import Quantize

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

small, source, out, *text = sys.argv[1:]
quantize = Quantize("atom-w4a8", {"samples": 4, "length": 256}, Path(text[0])) if text else None
convert(small, out + "-small", quantize=quantize)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
convert(source, out, quantize=quantize)
print(status("VmHWM") - before)
"""


def write_big_folder(folder, config, shards=3):
    """A sharded bfloat16 checkpoint of noise, written in blocks. Returns the bytes of its largest tensor."""
    shapes = {spec.name: spec.shape for spec in tensor_table(from_hugging_face(config))}
    noise = (np.random.default_rng(0).integers(0, 1 << 14, 4 * MIB, dtype=np.uint16) | 0x3000).tobytes()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map, names = {}, list(shapes)
    for shard in range(shards):
        file, header, end = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors", {}, 0
        for name in names[shard::shards]:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
        weight_map |= dict.fromkeys(header, file)
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for left in range(end, 0, -len(noise)):
                out.write(noise[:left])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(2 * math.prod(shape) for shape in shapes.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", MODELS)
def test_peak_memory_is_below_twice_the_largest_tensor(family, tmp_path):
    try:
        largest = write_big_folder(tmp_path / "big", MODELS[family] | COMMON | {"model_type": family})
        small = MODELS[family] | {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64}
        write_big_folder(tmp_path / "small", small | COMMON | {"model_type": family})
        command = [sys.executable, "-c", MEASURED, *(tmp_path / name for name in ("small", "big", "out"))]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    finally:
        shutil.rmtree(tmp_path)
    print(
        f"{family}: largest tensor {largest / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB, {peak / largest:.2f} of it"
    )
    assert peak < 2 * largest


QUANTIZED = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
WEIGHTS = 1024 * (4 * 1024 + 3 * 2048)  # of a layer


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_quantizing_does_not_grow_with_the_layers(tmp_path):
    """Four more layers take less than one of them in float32. All in all it is some ten of them: GPTQ's moments in float64,
    and what one layer over one window takes."""
    text = tmp_path / "text.txt"
    draw = np.random.default_rng(0)
    text.write_text(" ".join(f"w{i}" for i in draw.integers(1, 64, 2000)))
    peaks = {}
    for layers in (4, 8):
        folder = tmp_path / str(layers)
        folder.mkdir()
        small = QUANTIZED | {"hidden_size": 128, "intermediate_size": 128}
        for name, config in (("small", small), ("big", QUANTIZED)):
            write_big_folder(folder / name, config | COMMON | {"num_hidden_layers": layers})
            (folder / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        command = [sys.executable, "-c", MEASURED, *(folder / n for n in ("small", "big", "out")), text]
        peaks[layers] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        shutil.rmtree(folder)
    layer = 4 * WEIGHTS
    print({layers: f"{peak / layer:.1f} layers in float32" for layers, peak in peaks.items()})
    assert peaks[8] < peaks[4] + layer
    assert peaks[8] < 16 * layer
