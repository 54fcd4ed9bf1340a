"""The host's memory: the experts once, whether they are written, mapped or computed with. Writes a gigabyte."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.models import tensor_table
from jaxinfer.models.families import from_hugging_face

MIB = 2**20
MIXTRAL = {
    "model_type": "mixtral",
    "dtype": "float32",
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "max_position_embeddings": 256,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
EXPERTS = 4 * 8 * 3 * 512 * 2048 * 4  # bytes

# Memory beyond that of an interpreter which has run the same programs for a model of small experts, and beyond the pool, which
# stands for a device's memory here.
MEASURED = """
import sys
from convert.convert import convert
from jaxinfer import LLM, SamplingParams, load_config

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

def serve(source, out):
    convert(source, out)
    settings = ["cache.pages=80", "engine.layers=scan", "engine.max_tokens_per_step=64", "engine.max_seqs=8",
                "offload.device_memory=90MB", "offload.policy=host", "offload.adaptive=false",
                "offload.folder=" + out + "-experts"]
    llm = LLM(out, config=load_config(None, settings))
    prompts = [[token] * 100 for token in range(16)]  # visits every expert
    for answer in llm.generate(prompts, SamplingParams(temperature=1.0, seed=1, max_tokens=20)):
        assert answer.error is None
    return llm

small, source, out = sys.argv[1:]
first = serve(small, out + "-small")
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
llm = serve(source, out)
assert llm.metrics()["expert_on_host"] > 0
print(status("VmHWM") - before - llm.engine.device._state.slots.nbytes)
"""


def write(folder, config):
    """A Hugging Face folder of random weights."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {spec.name: spec.shape for spec in tensor_table(from_hugging_face(config))}
    weights = {name: draw.standard_normal(shape, np.float32) / 20 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_holds_the_experts_once(tmp_path):
    write(tmp_path / "big", MIXTRAL)
    write(tmp_path / "small", MIXTRAL | {"intermediate_size": 64})
    command = [sys.executable, "-c", MEASURED, *(tmp_path / name for name in ("small", "big", "out"))]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"experts {EXPERTS / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB, {peak / EXPERTS:.3f} of them")
    assert peak <= 1.1 * EXPERTS
