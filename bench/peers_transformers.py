"""Runs in the peers' environment: torch and transformers, nothing of ours. Prints one JSON object."""

import json
import sys
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

BATCH = 16
COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "num_key_value_heads": 4,
}
LLAMA = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}
MIXTRAL = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1024}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}


def make(name: str):
    torch.manual_seed(0)
    if name == "llama-110m":
        return LlamaForCausalLM(LlamaConfig(**COMMON | LLAMA)).eval()
    return MixtralForCausalLM(MixtralConfig(**COMMON | MIXTRAL | EXPERTS)).eval()


def generate(model, jobs) -> None:
    """Length-sorted static batches, padded on the left, each as long as its longest answer."""
    jobs = sorted(jobs, key=lambda job: len(job[0]))
    for first in range(0, len(jobs), BATCH):
        batch = jobs[first : first + BATCH]
        longest = max(len(prompt) for prompt, _ in batch)
        answer = max(answer for _, answer in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        forced = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, **forced)


def matmul_rate(size: int = 2048) -> float:
    a = torch.randn(size, size)
    a @ a
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)


def main() -> None:
    with open(sys.argv[1]) as file:
        work = json.load(file)
    model = make(work["model"])
    generate(model, [(prompt[:32], 4) for prompt, _ in work["jobs"]])
    rate = matmul_rate()
    start = time.perf_counter()
    generate(model, work["jobs"])
    print(json.dumps({"seconds": time.perf_counter() - start, "matmul_rate": rate}))


main()
