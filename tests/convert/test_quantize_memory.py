"""Quantizing holds one layer at a time: its peak memory does not grow with the layers."""

import json
import subprocess
import sys

import numpy as np
import pytest
from test_convert_memory import COMMON, MIB, write_big_folder
from test_quantize import TOKENIZER

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
LAYER = 4 * (4 * 768 * 768 + 3 * 768 * 2048)  # bytes of its matrices in float32

# Memory beyond that of an interpreter that has quantized a model of one layer.
MEASURED = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from pathlib import Path
from convert.convert import convert
from convert.quantize import Quantize

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

folder, *layers = sys.argv[1:]
for count in layers:
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    out = f"{folder}/out-{count}"
    convert(f"{folder}/{count}", out, quantize=Quantize("atom-w4a8", {"group": 128}, Path(folder) / "text.txt"))
    print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_layers(tmp_path):
    counts = (1, 2, 5)
    for count in counts:
        write_big_folder(tmp_path / str(count), LLAMA | COMMON | {"num_hidden_layers": count})
        (tmp_path / str(count) / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    words = np.random.default_rng(0).integers(1, 64, 300)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    command = [sys.executable, "-c", MEASURED, str(tmp_path), *map(str, counts)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    _, few, many = (int(line) for line in done.stdout.split())
    print(f"a layer {LAYER / MIB:.0f} MiB, peak {few / MIB:.0f} MiB with two and {many / MIB:.0f} with five")
    assert many < few + LAYER
    assert few < 8 * LAYER
