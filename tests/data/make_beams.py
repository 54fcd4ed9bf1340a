"""Regenerates tests/data/beams.json: answers of transformers' beam search on tests/data/families and on given checkpoints.

Run with an environment that has torch and transformers (the data kept here: torch 2.13, transformers 5.23):

    python tests/data/make_beams.py path/to/checkpoints
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
FAMILIES = ("llama2", "mistral", "mixtral", "qwen3_moe", "phi3")
CHECKPOINTS = ("stories260K", "babyllama105", "babyllama105-moe")
PENALTIES = (1.0, 0.0, 2.0, -1.0, 0.5)
EARLY: tuple[bool | str, ...] = (False, True, "never")


def answers(
    model, prompt: list[int], width: int, stops: list[int], fewest: int, **settings
) -> dict[str, Any]:
    """One case: what was asked, and the answers without what pads them, best first."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        eos_token_id=stops or None,
        pad_token_id=-1,
        min_new_tokens=fewest,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    ids = [[token for token in row if token >= 0] for row in out.sequences[:, len(prompt) :].tolist()]
    return {
        "prompt": prompt,
        "width": width,
        "stops": stops,
        "min_tokens": fewest,
        **settings,
        "ids": ids,
        "scores": out.sequences_scores.tolist(),
    }


def likely_stops(model, prompt: list[int], count: int, new: int) -> list[int]:
    """Tokens that greedy decoding comes to, so that answers end everywhere."""
    out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, eos_token_id=None)
    seen = out[0, len(prompt) :].tolist()
    return sorted(set(seen[len(seen) // 2 :]))[:count]


def cases(model, prompts: list[list[int]], new: int) -> list[dict[str, Any]]:
    rules = itertools.cycle(itertools.product(EARLY, PENALTIES))
    found = []
    for prompt, width, ends in itertools.product(prompts, (2, 5), (0, 1, 3)):
        early, penalty = next(rules)
        stops = likely_stops(model, prompt, ends, new) if ends else []
        settings = {"max_new_tokens": new, "length_penalty": penalty, "early_stopping": early}
        found.append(answers(model, prompt, width, stops, 3 * (ends == 3), **settings))
    return found


def load(folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig()
    return model


def main(checkpoints: Path) -> None:
    found = {}
    for name in FAMILIES:
        golden = np.load(HERE / "families" / name / "golden.npz")
        tokens = golden["tokens"].tolist()
        found[f"families/{name}"] = cases(load(HERE / "families" / name), [tokens[:9], tokens[:30]], 12)
    for name in CHECKPOINTS:
        reference = json.loads((checkpoints / name / "reference.json").read_text())
        prompts = [case["prompt_ids"] for case in reference["cases"]][:2]
        found[f"checkpoints/{name}"] = cases(load(checkpoints / name), prompts, 40)
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found.items())
    (HERE / "beams.json").write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
