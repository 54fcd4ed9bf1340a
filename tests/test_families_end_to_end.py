"""Every family from its Hugging Face folder through converter and engine, against transformers' logits."""

from pathlib import Path

import numpy as np
import pytest

from convert.convert import convert
from jaxinfer import LLM, SamplingParams, load_config

FAMILIES = Path(__file__).parent / "data" / "families"
CASES = sorted(path.name for path in FAMILIES.iterdir() if (path / "golden.npz").exists())
# One of each architecture, and of what the engine itself has to know. The others' models are compared in tests/models.
ALWAYS = {
    "llama3", "llama_longrope", "llama_yarn", "mistral", "mixtral", "olmoe", "phi3_partial", "phimoe", "qwen2_window", "qwen3",
    "qwen3_moe_mixed",
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in ALWAYS else pytest.mark.slow) for case in CASES]
)
def test_scores_and_next_tokens_are_those_of_transformers(case, tmp_path):
    golden = np.load(FAMILIES / case / "golden.npz")
    tokens, logits = golden["tokens"].reshape(-1), golden["logits"].reshape(golden["tokens"].size, -1)
    logits = logits.astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    convert(FAMILIES / case, tmp_path / case)
    small = ["engine.max_seqs=4", "engine.max_tokens_per_step=32", "cache.pages=64"]
    for chunk in (32, 5):
        llm = LLM(tmp_path / case, config=load_config(None, [*small, f"engine.chunk={chunk}"]))
        prompt = tokens[: llm.engine.memory.context]
        scores = llm.score(prompt)
        np.testing.assert_allclose(scores, expected[np.arange(len(prompt) - 1), prompt[1:]], atol=2e-4)
        greedy = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
        if len(prompt) == len(tokens) < llm.engine.memory.context:
            (out,) = llm.generate([prompt], greedy)
            assert out.token_ids == (int(expected[-1].argmax()),)
            assert out.logprobs[0].logprob == pytest.approx(expected[-1].max(), abs=2e-4)
        llm.engine.check_integrity()
