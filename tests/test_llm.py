"""The library call on real checkpoints, against transformers' own answers."""

import itertools
import json

import numpy as np
import pytest

from convert.convert import convert
from jaxinfer import LLM, ModelError, RequestError, SamplingParams, load_config

CHECKPOINTS = ("stories260K", "babyllama105", "babyllama105-moe")


@pytest.fixture(scope="session")
def converted(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")

    def get(name: str):
        source = shared_data(f"checkpoints/{name}")
        if not (folder / name).exists():
            convert(source, folder / name)
        reference = json.loads((source / "reference.json").read_text())
        return folder / name, reference

    return get


@pytest.fixture(scope="session")
def stories(converted):
    folder, _ = converted("stories260K")
    return LLM(folder)


def greedy(cases) -> list[SamplingParams]:
    return [SamplingParams(temperature=0, max_tokens=len(c["greedy_ids"]), ignore_eos=True) for c in cases]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_answers_equal_the_reference_in_any_company(converted, name):
    folder, reference = converted(name)
    cases = reference["cases"]
    expected = [case["greedy_ids"] for case in cases]
    prompts = [case["prompt_ids"] for case in cases]
    for chunk in (16, 64, 512):
        llm = LLM(folder, config=load_config(None, [f"engine.chunk={chunk}"]))
        assert [list(o.token_ids) for o in llm.generate(prompts, greedy(cases))] == expected
        backwards = llm.generate(prompts[::-1], greedy(cases[::-1]))  # now with prefix hits
        assert [list(o.token_ids) for o in backwards] == expected[::-1]
        assert llm.metrics()["cached_tokens"] > 0
        llm.engine.check_integrity()
    llm = LLM(folder, config=load_config(None, ["cache.prefix_sharing=false"]))
    for prompt, sampling, ids, case in zip(prompts, greedy(cases), expected, cases, strict=True):
        (out,) = llm.generate([prompt], sampling)
        assert list(out.token_ids) == ids
        assert llm.tokenizer.encode(case["prompt"]) == prompt
        # the reference shows special tokens and drops the space before its first word
        assert case["greedy_text"].replace("<unk>", "").strip() == out.text.strip()
    assert llm.metrics()["cached_tokens"] == 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_first_logits_equal_the_reference(converted, name):
    folder, reference = converted(name)
    llm = LLM(folder)
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
    cases = reference["cases"]
    for case, out in zip(cases, llm.generate([c["prompt_ids"] for c in cases], sampling), strict=True):
        scores = np.asarray(case["prompt_last_logits"], np.float64)
        logprobs = scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
        (token,) = out.logprobs
        assert len(token.top) == 20
        for index, value in token.top:
            assert value == pytest.approx(logprobs[index], abs=1e-3)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_nll_equals_the_reference(converted, shared_data, name):
    folder, reference = converted(name)
    rule = reference["tinystories_nll"]
    llm = LLM(folder)
    text = shared_data(rule["file"]).read_text()[: rule["first_chars"]]
    ids = [i for i in llm.tokenizer.encode(text) if i != 1][: rule["tokens"]]
    blocks = [[1, *ids[start : start + rule["block"]]] for start in range(0, len(ids), rule["block"])]
    scores = np.concatenate(llm.score(blocks))
    assert -scores.mean() == pytest.approx(rule["mean_nll"], abs=1e-4)


def test_text_chat_and_score(stories):
    (out,) = stories.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=5))
    assert out.text == ", there was a little" and out.usage.prompt_tokens == 5
    (chat,) = stories.chat(
        [[{"role": "user", "content": "Once upon a time"}]], SamplingParams(temperature=0, max_tokens=5)
    )
    assert chat.token_ids == out.token_ids
    alone = stories.score("Once upon a time")
    assert alone.shape == (4,) and (alone < 0).all()
    np.testing.assert_allclose(stories.score(["Once upon a time", [1, 403, 407]])[0], alone, atol=1e-5)


def test_stop_strings_cut_the_text(stories):
    sampling = SamplingParams(temperature=0, max_tokens=60, stop=("Lily", " park"))
    (out,) = stories.generate(["Once upon a time"], sampling)
    assert out.text == ", there was a little girl named " and out.finish_reason == "stop"


def test_prompts_that_cannot_be_served_keep_their_place(stories):
    prompts = ["Once upon a time", "", [1, 2, 9999], [1] * 600, "The end", ["x"], None]
    outs = list(stories.generate(prompts, SamplingParams(temperature=0, max_tokens=4)))
    codes = [out.error.code if out.error else None for out in outs]
    # the empty text is not an empty prompt: the tokenizer begins it with its beginning-of-sequence token
    assert codes == [
        None,
        None,
        "invalid_token",
        "context_length_exceeded",
        None,
        "invalid_prompt",
        "invalid_prompt",
    ]
    assert [out.request_id for out in outs] == [str(i) for i in range(7)]
    with pytest.raises(RequestError, match="600"):
        stories.score([1] * 600)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda llm: llm.generate("Once upon a time"), "prompts: expected a list"),
        (lambda llm: llm.generate(None), "prompts: expected a list"),
        (lambda llm: llm.generate({"prompt": "a"}), "prompts: expected a list"),
        (lambda llm: llm.score(None), "prompts: expected a list"),
        (lambda llm: llm.generate(["a"], {"temperature": 0}), "sampling: expected SamplingParams"),
        (lambda llm: llm.generate(["a"], 5), "sampling: expected SamplingParams"),
        (lambda llm: llm.generate(["a"], [None]), "sampling: expected a SamplingParams for each"),
        (lambda llm: llm.chat([{"role": "user", "content": "a"}]), "wrap one conversation in a list"),
        (lambda llm: llm.chat(None), "conversations: expected a list"),
        (lambda llm: LLM(config="x"), "config: expected Settings"),
        (lambda llm: LLM(config={}), "config: expected Settings"),
    ],
)
def test_a_wrong_argument_is_named(stories, call, said):
    with pytest.raises(TypeError, match=said):
        list(call(stories))


def test_errors_of_the_callers_own_iterators_pass_as_they_are(stories):
    def prompts():
        yield "a"
        raise ValueError("line 2 is broken")

    with pytest.raises(ValueError, match="line 2 is broken"):
        list(stories.generate(prompts(), [SamplingParams(max_tokens=1)] * 2))
    for one, other in [(["a", "b"], [SamplingParams()]), (["a"], [SamplingParams()] * 2)]:
        with pytest.raises(ValueError, match="sampling: expected one"):
            list(stories.generate(one, other))


def test_half_a_character_and_an_empty_list(stories):
    sampling = SamplingParams(temperature=0, max_tokens=2)
    bad, good = stories.generate(["a\ud800b", "a"], sampling)
    assert bad.error.code == "invalid_prompt" and "character 1" in bad.error.message
    assert good.error is None
    conversations = [[{"role": "user", "content": "a\udfff"}], ({"role": "user", "content": "a"},), ["a"], 5]
    outs = list(stories.chat(iter(conversations), sampling))
    codes = [out.error and out.error.code for out in outs]
    assert codes == ["invalid_prompt", None, "invalid_messages", "invalid_messages"]
    (single,) = stories.chat(iter([{"role": "user", "content": "a"}]), sampling)
    assert "wrap" in single.error.message
    assert stories.score([]) == [] and list(stories.generate([])) == []


def test_prompts_that_cannot_be_served_do_not_make_it_read_on(stories):
    read = itertools.count()
    outs = stories.generate(None if next(read) else "a" for _ in itertools.count())
    assert next(outs).error is None and next(outs).error.code == "invalid_prompt"
    outs.close()
    assert next(read) < 1000


def test_a_folder_that_is_no_converted_model(tmp_path, shared_data):
    with pytest.raises(ModelError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="jaxinfer-convert"):
        LLM(shared_data("checkpoints/stories260K"))
