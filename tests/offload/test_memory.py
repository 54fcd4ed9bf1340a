"""The host's memory under the batch command: the experts once. Writes a gigabyte."""

import json
import shutil
import subprocess
import sys
from itertools import islice

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.convert import convert
from jaxinfer import load_config
from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models import tensor_table
from jaxinfer.models.families import from_hugging_face
from jaxinfer.models.manifest import read_manifest
from pallas_kernels.packed_experts import Record

from .engines import with_slots

MIB = 2**20
WIDTH, LAYERS, EXPERTS = 256, 8, 16
REQUESTS = EMBEDDED_MODEL.parent / "demo" / "requests.jsonl"
SETTINGS = (
    "model.dtype=float32",
    "engine.layers=scan",
    "engine.max_seqs=8",
    "engine.max_tokens_per_step=128",
    "engine.max_context=1024",
    "cache.pages=120",
)
# A process of its own: the batch command, then the bytes that were in memory at most.
SERVES = """
import sys
from jaxinfer.batch.cli import main

code = main(sys.argv[1:])
lines = dict(line.split(":") for line in open("/proc/self/status"))
print(int(lines["VmHWM"].split()[0]) * 1024)
sys.exit(code)
"""


def write(folder, width):
    """A Mixtral of random weights whose experts are so wide, with the embedded model's tokenizer."""
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text()) | {
        "hidden_size": WIDTH,
        "intermediate_size": width,
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "max_position_embeddings": 1024,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(EMBEDDED_MODEL / name, folder)
    draw = np.random.default_rng(0)
    weights = {
        spec.name: (draw.standard_normal(spec.shape, np.float32) / 20).astype(ml_dtypes.bfloat16)
        for spec in tensor_table(from_hugging_face(config))
    }
    save_file(weights, folder / "model.safetensors")


def answers(folder, policy):
    """Answers rows of the demo and returns the bytes at the peak without the pool of experts, which on a CPU stands for
    a device's memory."""
    settings = [*SETTINGS, f"offload.folder={folder}", f"offload.policy={policy}"]
    config = read_manifest(folder / "model").config
    planned = with_slots(config, load_config(None, settings), LAYERS * EXPERTS // 4)
    settings.append(f"offload.device_memory={planned.offload.device_memory}")
    with open(REQUESTS) as lines:
        rows = list(islice((json.loads(line) for line in lines if len(line) < 2000), 16))
    for row in rows:
        row["body"] |= {"max_tokens": 6, "ignore_eos": True}
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"--set={text}" for text in settings]
    files = ["-i", folder / "in.jsonl", "-o", folder / "out.jsonl"]
    command = [sys.executable, "-c", SERVES, *files, "--quiet", "--overwrite", "--model", folder / "model"]
    done = subprocess.run([*command, *words], check=True, stdout=subprocess.PIPE, text=True)
    out = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len(out) == 16 and all(row["error"] is None for row in out)
    assert config.moe is not None
    pool = LAYERS * EXPERTS // 4 * Record(WIDTH, config.moe.width, "float32").nbytes
    return int(done.stdout.split()[-1]) - pool


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_holds_the_experts_once(tmp_path):
    """Two models that differ by the bytes of their experts differ by 1.1 times that at most, when the records are written
    (first) and when they are found, host and streams at work or streams alone."""
    wide, narrow = 1024, 128
    for name, width in (("big", wide), ("small", narrow)):
        write(tmp_path / name / "source", width)
        convert(tmp_path / name / "source", tmp_path / name / "model")
    more = (
        LAYERS * EXPERTS * (Record(WIDTH, wide, "float32").nbytes - Record(WIDTH, narrow, "float32").nbytes)
    )
    for policy in ("balanced", "stream"):
        big, small = (answers(tmp_path / name, policy) for name in ("big", "small"))
        print(f"{policy}: {more / MIB:.0f} MiB of experts more, {(big - small) / MIB:.0f} MiB at the peak")
        assert big - small <= 1.1 * more
