"""Runs where torch and transformers are, nothing of ours: greedy answers of a Hugging Face folder.

`python transformers_answers.py FOLDER MOST` reads a list of prompts (token ids) from standard input and writes the list of answers
(token ids, at most MOST), both JSON.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    answers = []
    for prompt in json.load(sys.stdin):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=int(sys.argv[2]),
                do_sample=False,
                pad_token_id=0,
            )
        answers.append(out[0, len(prompt) :].tolist())
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
