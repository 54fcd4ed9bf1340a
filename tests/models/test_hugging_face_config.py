"""Reading config.json: both generations of its keys, family defaults, and complaints that name the key."""

import json

import pytest
from checkpoint_helpers import CASES, FAMILIES

from jaxinfer.errors import ModelError
from jaxinfer.models import MoEConfig, RopeConfig, from_hugging_face, from_json, to_json

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def read(generation=None, **changes):
    merged = LLAMA | {"architectures": None} | changes
    return from_hugging_face({k: v for k, v in merged.items() if v != "absent"}, generation)


def test_llama_defaults():
    config = read()
    assert (config.kv_heads, config.head_dim, config.norm_eps, config.context_length) == (4, 8, 1e-6, 128)
    assert config.rope == RopeConfig(theta=10000.0, dim=8)
    assert (config.bos_id, config.eos_ids, config.dtype) == (1, (2,), "float32")
    assert (config.windows, config.runs) == ((0,) * 4, ((False, 4),))


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ],
)
def test_both_forms_of_rotary_settings(keys):
    config = read(**keys)
    assert config.rope == RopeConfig(theta=5e5, dim=8, kind="linear", factor=2.0)
    assert config.context_length == 256


def test_null_rotary_settings_and_head_dim_are_defaults():
    assert read(rope_scaling=None, head_dim=None, rope_theta=None) == read()


def test_stretches_reach_beyond_their_original_context():
    assert read(rope_scaling={"type": "dynamic", "factor": 3.0}).context_length == 384
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read(rope_scaling=yarn).context_length == 512
    assert read(rope_scaling=yarn | {"original_max_position_embeddings": 32}).context_length == 128


def test_original_context_beside_the_rotary_settings_goes_first():
    rope = read(rope_scaling=LONGROPE | {"original_max_position_embeddings": 64}).rope
    assert (rope.original_context, rope.factor) == (64, 2.0)
    rope = read(rope_scaling=LONGROPE, original_max_position_embeddings=32).rope
    assert (rope.original_context, rope.factor) == (32, 4.0)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_phi3_calls_longrope_by_three_names(kind):
    scaling = LONGROPE | {"type": kind}
    del scaling["rope_type"]
    config = read(model_type="phi3", rope_scaling=scaling, original_max_position_embeddings=32)
    assert (config.rope.kind, config.rope.original_context) == ("longrope", 32)


def test_eos_tokens_of_both_files_are_joined():
    assert read(eos_token_id=[5, 6], generation={"eos_token_id": 7}).eos_ids == (5, 6, 7)
    assert read(eos_token_id=5, generation={"eos_token_id": [5, 7]}).eos_ids == (5, 7)
    assert read(generation={"eos_token_id": 9}).eos_ids == (9,)
    assert read(eos_token_id=None).eos_ids == ()
    assert read(eos_token_id=[5, 64, -1]).eos_ids == (5,)  # 64 is not in the vocabulary


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, (16,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (0,) * 4),
        ({"model_type": "mistral", "sliding_window": 128}, (0,) * 4),  # as long as the context: never bites
        ({"model_type": "mistral", "max_position_embeddings": 8192}, (4096,) * 4),
        ({"model_type": "qwen2", "sliding_window": 16}, (0,) * 4),
        (
            {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3},
            (0, 0, 0, 16),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (16, 0, 16, 0),
        ),
        ({"model_type": "qwen3_moe", "sliding_window": 16, "use_sliding_window": True, **MOE}, (16,) * 4),
    ],
)
def test_windows(keys, windows):
    assert read(num_key_value_heads=2, **keys).windows == windows


def test_experts_of_some_layers():
    keys = {"model_type": "qwen3_moe", "num_key_value_heads": 2, **MOE}
    config = read(**keys, decoder_sparse_step=2)
    assert config.moe == MoEConfig(experts=4, experts_per_token=2, width=8, renormalize=False)
    assert config.moe_layers == (False, True, False, True)
    assert read(**keys, mlp_only_layers=[1, 2]).runs == ((True, 1), (False, 2), (True, 1))
    dense = read(**keys | {"num_local_experts": 0})
    assert (dense.moe, dense.runs) == (None, ((False, 4),))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype(name):
    assert read(**{name: "bfloat16"}).dtype == "bfloat16"
    assert read(**{name: "float16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model_type", {"model_type": "gpt2"}),
        ("model_type", {"model_type": "absent"}),
        ("architectures", {"architectures": ["LlamaForSequenceClassification"]}),
        ("quantization_config", {"quantization_config": {"quant_method": "awq"}}),
        ("hidden_size", {"hidden_size": "absent"}),
        ("hidden_size", {"hidden_size": -32}),
        ("hidden_size", {"hidden_size": 32.0}),
        ("hidden_size", {"hidden_size": "32"}),
        ("hidden_size", {"hidden_size": 34}),
        ("vocab_size", {"vocab_size": None}),
        ("num_hidden_layers", {"num_hidden_layers": 0}),
        ("num_hidden_layers", {"num_hidden_layers": 10**12}),
        ("num_attention_heads", {"num_attention_heads": True}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("intermediate_size", {"intermediate_size": [48]}),
        ("max_position_embeddings", {"max_position_embeddings": 0}),
        ("head_dim", {"head_dim": 7}),
        ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
        ("hidden_act", {"hidden_act": "mish"}),
        ("attention_bias", {"attention_bias": "yes"}),
        ("tie_word_embeddings", {"tie_word_embeddings": 1}),
        ("eos_token_id", {"eos_token_id": "</s>"}),
        ("dtype", {"dtype": "float8_e4m3fn"}),
        ("rope_theta", {"rope_theta": -1}),
        ("rope_scaling", {"rope_scaling": "linear"}),
        ("rope_type", {"rope_scaling": {"rope_type": "mrope"}}),
        ("type", {"rope_scaling": {"type": "mrope"}}),
        ("factor", {"rope_scaling": {"rope_type": "linear"}}),
        ("factor", {"rope_scaling": {"rope_type": "dynamic", "factor": "2"}}),
        ("high_freq_factor", {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}}),
        ("long_factor", {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 3}}),
        ("short_factor", {"rope_scaling": LONGROPE | {"short_factor": [0.0] * 4}}),
        ("full_attention", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", {"model_type": "phi3", "partial_rotary_factor": 0.4}),
        ("short_mscale", {"model_type": "phimoe", "rope_scaling": LONGROPE, **MOE}),
        ("sliding_window", {"model_type": "mistral", "sliding_window": 0}),
        (
            "layer_types",
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
        ),
        ("num_experts_per_tok", {"model_type": "mixtral", **MOE, "num_experts_per_tok": 5}),
        ("num_experts_per_tok", {"model_type": "phimoe", **MOE, "num_experts_per_tok": 1}),
        ("hidden_act", {"model_type": "mixtral", **MOE, "hidden_act": "relu"}),
        ("mlp_only_layers", {"model_type": "qwen3_moe", **MOE, "mlp_only_layers": ["1"]}),
    ],
)
def test_bad_values_are_refused_by_name(key, changes):
    kv_heads = {} if "num_key_value_heads" in changes else {"num_key_value_heads": 2}
    if changes.get("hidden_size") == 34 or changes.get("num_attention_heads"):
        kv_heads = {"num_key_value_heads": None}
    with pytest.raises(ModelError, match=rf"{key} is .*; accepted: "):
        read(**kv_heads, **changes)


def test_generation_config_is_named_in_its_own_complaints():
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id is 'x'"):
        read(generation={"eos_token_id": "x"})


def test_not_an_object():
    with pytest.raises(ModelError, match="accepted: a JSON object"):
        from_hugging_face(["llama"])


@pytest.mark.parametrize("case", CASES)
def test_json_form_holds_everything(case):
    config = from_hugging_face(json.loads((FAMILIES / case / "config.json").read_text()))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("layers",), "4", "layers is '4'"),
        (("norm",), "batch", "norm is 'batch'; accepted: rms, layer"),
        (("rope", "theta"), None, "rope.theta is None"),
        (("rope",), 3, "rope is 3"),
        (("windows",), [0, "x"], r"windows\[1\] is 'x'"),
        (("windows",), 5, "windows is 5; accepted: a value of type list"),
        (("depth",), 4, "depth is not known"),
    ],
)
def test_a_damaged_json_form_is_refused(path, value, complaint):
    damaged = to_json(read())
    holder = damaged
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    with pytest.raises(ModelError, match=complaint):
        from_json(damaged)


def test_a_missing_field_of_the_json_form_is_named():
    damaged = to_json(read())
    del damaged["vocab_size"]
    with pytest.raises(ModelError, match="vocab_size is missing"):
        from_json(damaged)
