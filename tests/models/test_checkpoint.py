"""Loading of converted folders: exact values for every family, and clear errors for damaged ones."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import CASES, FAMILIES, load_golden

from convert.convert import convert
from jaxinfer.errors import ModelError
from jaxinfer.models import abstract, unstack
from jaxinfer.models.checkpoint import load_model, of_expert, read_manifest, read_pieces


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert_case("mixtral", tmp_path_factory.mktemp("converted"))


@pytest.fixture
def folder(converted, tmp_path):
    """A copy to damage."""
    return shutil.copytree(converted, tmp_path / "model")


def convert_case(case, parent):
    convert(FAMILIES / case, parent / case, dtype="float32")
    return parent / case


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("case", CASES)
def test_every_family_comes_back_exactly(case, tmp_path):
    golden = load_golden(case)
    config, model = load_model(convert_case(case, tmp_path))
    assert config == read_manifest(tmp_path / case).config
    assert_same(model, golden.model)


def test_unstacked_layers_are_those_of_the_stack(tmp_path):
    folder = convert_case("qwen3_moe_mixed", tmp_path)  # dense and sparse layers in turn
    config, stacked = load_model(folder)
    assert_same(load_model(folder, layout="unstacked")[1], unstack(stacked, config))


def test_dtype_is_changed_on_the_way(converted):
    (kept, wide), (config, narrow) = load_model(converted), load_model(converted, dtype="bfloat16")
    assert (kept.dtype, config.dtype) == ("float32", "bfloat16")
    assert_same(narrow, jax.tree.map(lambda a: a.astype(jnp.bfloat16), wide))


def test_pieces_hold_every_parameter_once(converted):
    manifest = read_manifest(converted)
    count = sum(block.size for _, block in read_pieces(converted, manifest))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(abstract(manifest.config)))


SHARDED = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import NamedSharding, PartitionSpec
from jaxinfer.models.checkpoint import load_model
mesh = jax.make_mesh((4,), ("x",))
_, whole = load_model(sys.argv[1])
def spec(a):
    axis = max((i for i, n in enumerate(a.shape) if n % 4 == 0), default=None)
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "x") if axis is not None else PartitionSpec())
shardings = jax.tree.map(spec, whole)
_, sharded = load_model(sys.argv[1], sharding=shardings)
jax.tree.map(np.testing.assert_array_equal, whole, sharded)
jax.tree.map(lambda a, s: print(a.sharding == s), sharded, shardings)
"""


def test_shards_go_to_their_devices(converted):
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, converted], capture_output=True, text=True, check=True
    )
    assert set(run.stdout.split()) == {"True"}


def test_folders_that_are_no_converted_models(tmp_path):
    with pytest.raises(ModelError, match="no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"is not a converted model: it has no jaxinfer\.json"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=r"convert it first: jaxinfer-convert .*llama3 .*llama3-jaxinfer"):
        load_model(FAMILIES / "llama3")


MOE = {"experts": 2, "experts_per_token": 2, "width": 8}


def edit(folder, change):
    path = folder / "jaxinfer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "format 99.*reads format 1"),
        (lambda d: d.update(quantization={"method": "atom"}), "without quantization"),
        (lambda d: d.pop("config"), "is corrupt: KeyError"),
        (lambda d: d["parts"][0].pop("crc32"), "is corrupt: KeyError"),
        (lambda d: d["parts"][0]["pieces"].pop(3), "incomplete are"),
        (
            lambda d: d["parts"][0]["pieces"][0].update(leaf="layers.9.attention.qkv"),
            "does not match its own",
        ),
        (lambda d: d["parts"][0]["pieces"][0].update(leaf="layers.x"), "does not match its own config"),
        (lambda d: d["parts"][0]["pieces"][0].update(leaf="what"), "does not match its own config: what@"),
        (lambda d: d["parts"][0].update(name="00009"), "00009: is incomplete: 0 bytes of"),
        (lambda d: d["parts"][0].update(crc32=1), "a part of the model is corrupt"),
        (lambda d: d["config"].update(layers=0), "layers = 0"),
        (lambda d: d["config"].update(layers=10**12), r"layers = 10{12}"),
        (lambda d: d["config"].update(kv_heads=0), "kv_heads = 0"),
        (lambda d: d["config"].update(heads=5, kv_heads=2), r"kv_heads = 2 .*divisor of heads \(5\)"),
        (lambda d: d["config"].update(vocab_size=-1), "vocab_size = -1"),
        (lambda d: d["config"].update(windows=[0]), "windows = "),
        (lambda d: d["config"].update(moe=None), "moe = None"),
        (lambda d: d["config"].update(eos_ids=[10**6]), "eos_ids = "),
        (lambda d: d["config"]["rope"].update(dim=3), "dim = 3 .*even"),
        (lambda d: d["config"]["rope"].update(dim=1000), r"dim = 1000 .*head_dim"),
        (lambda d: d["config"]["rope"].update(kind="longrope", original_context=4), "short_factor = "),
        (lambda d: d["config"].update(moe=dict(MOE, experts_per_token=3)), "experts_per_token = 3"),
        (lambda d: d["config"].update(moe=dict(MOE, experts=0)), "experts = 0"),
        (lambda d: d["config"].update(norm_eps=float("nan")), "norm_eps = nan"),
    ],
)
def test_manifests_that_lie(folder, change, message):
    edit(folder, change)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_a_manifest_that_is_cut_off(folder):
    for text in ("{", "[" * 100_000, '{"format":' * 100_000):
        (folder / "jaxinfer.json").write_text(text)
        with pytest.raises(ModelError, match="is corrupt"):
            read_manifest(folder)


def test_a_flipped_bit_is_found(folder):
    embed = np.asarray(load_model(folder)[1].embed).tobytes()
    for path in (folder / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes().replace(embed, bytes([embed[0] ^ 1]) + embed[1:]))
    with pytest.raises(ModelError, match="a part of the model is corrupt; convert the model again"):
        load_model(folder)


def test_a_part_that_orbax_cannot_read(folder):
    for path in (folder / "params" / "00000").glob("*METADATA"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ModelError, match="a part of the model cannot be read"):
        load_model(folder)


def test_a_truncated_part_is_found(folder):
    for data in (folder / "params" / "00000" / "d").iterdir():
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ModelError, match="00000: is incomplete"):
        load_model(folder)


def test_the_experts_can_stay_away(converted):
    config = read_manifest(converted).config
    for layout in ("stacked", "unstacked"):
        _, rest = load_model(converted, layout=layout, experts=False)
        assert not [
            p for p, _ in jax.tree_util.tree_leaves_with_path(rest) if "gate_up" in str(p) or "down" in str(p)
        ]
    manifest = read_manifest(converted)
    held = {of_expert(piece) for piece, _ in read_pieces(converted, manifest, of_expert)}
    assert held == {(layer, expert) for layer in range(config.layers) for expert in range(config.moe.experts)}
    assert not list(read_pieces(converted, manifest, lambda piece: False))
