"""What the overlap bench counts and predicts, and that its baselines compute the same."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bench import overlap, overlap_attention, overlap_engine, overlap_product, overlap_steps
from bench.hopper import BANDWIDTH
from bench.one_step import LLAMA
from bench.overlap_product import Pair
from jaxinfer.models.config import RopeConfig
from jaxinfer.schedule.profile import MAX, SUM
from jaxinfer.schedule.step_times import Way
from pallas_kernels.hybrid_attention import hybrid_attention
from pallas_kernels.hybrid_attention.shapes import MixedShape
from pallas_kernels.hybrid_matmul.shapes import Beside
from pallas_kernels.int4_matmul.shapes import LowBitShape
from pallas_kernels.page_attention.shapes import ListShape

TINY = MixedShape(4, 2, 64, 16, ((24, 40),), (33, 7), 1)
PAGES = ListShape(4, 2, 64, 16, (33, 7), 2)


def test_work_of_attention_is_counted_tile_by_tile():
    shape = MixedShape(32, 8, 128, 16, ((70, 100), (5, 5)), (300, 64), 8)
    flops = 0
    for tokens, length in shape.chunks:
        for first in range(0, tokens, 32):  # 128 rows, four heads
            last = length - tokens + min(first + 32, tokens)
            steps = len(range(0, last, 64))
            flops += steps * 2 * (2 * 128 * 64 * 128) * 8
    read = 2 * (300 + 64) * 128 * 2 * 8
    partial = (2 + 1) * 8 * 2 * (4 * 128 * 4 + 2 * 16 * 4)  # parts of 256 tokens, written and read
    assert overlap_attention.Work.of(shape) == overlap_attention.Work(flops, read + partial)


def test_work_of_a_product_is_counted_tile_by_tile():
    pair = Pair(Beside(LowBitShape(130, 512, 768), ListShape(32, 8, 128, 16, (300, 64), 8)), False)
    flops = cached = tiles = 0
    for _ in range(0, 768, 256):
        cached += 2 * 256 * 512  # columns, for both rows of tiles
        for _ in range(0, 130, 128):
            tiles += 1
            flops += 2 * 128 * 256 * 512
            cached += 2 * 128 * 512
    rest = 2 * 256 * 512 + 2 * 130 * 768  # rows that fill tiles up are read, not written
    pages = overlap_attention.Work.of(MixedShape(32, 8, 128, 16, (), (300, 64), 8)).bytes
    steps = 8 * (5 + 1)  # of 64 tokens
    want = overlap_product.Work(flops, tiles, cached, 2 * 512 * 768, rest, pages, steps)
    assert overlap_product.Work.of(pair) == want


def test_a_processor_s_queue_is_counted_in_whole_tiles():
    """A pair of tiles more than there are processors takes as long as one more for each."""
    attention = ListShape(32, 8, 128, 16, (16,), 1)
    times = [
        overlap_product.predicted(Pair(Beside(LowBitShape(256, 1 << 16, 256 * pairs), attention), False))[2]
        for pairs in (66, 67, 132)
    ]
    assert times[1] == pytest.approx(times[2]) and times[1] > 1.9 * times[0]


@pytest.mark.parametrize("tokens", [(300, 64), (64,)])
def test_low_bits_read_fewer_bytes(tokens):
    sizes = LowBitShape(64, 512, 256), ListShape(32, 8, 128, 16, tokens, 1)
    work = {low: overlap_product.Work.of(Pair(Beside(*sizes), low)) for low in (False, True)}
    kept = 512 - 128  # channels of 4 bits; then outliers, scales of groups, two scales of the output
    assert work[True].weights == 256 * (kept // 2 + 128 + kept // 128 + 8)
    key = 2 * 8 * sum(tokens)  # keys and values of all heads
    assert work[False].bytes - work[True].bytes == key * (2 * 128 - (64 + 4))


@pytest.mark.parametrize("part", overlap.PARTS)
def test_both_take_as_long_as_the_longer(part):
    """And in no attention longer than one after the other; products may, by the second-level cache."""
    module = overlap.PARTS[part]
    for shape in module.mixes(False).values():
        compute, memory, joint = module.predicted(shape)
        assert MAX(compute, memory) <= joint
        assert part == "product" or joint <= SUM(compute, memory)


def test_a_role_alone_takes_its_own_time():
    compute, memory, joint = overlap_attention.predicted(MixedShape(32, 8, 128, 16, ((512, 512),), ()))
    assert memory == 0 and joint == pytest.approx(compute)
    compute, memory, joint = overlap_attention.predicted(MixedShape(32, 8, 128, 16, (), (4096,) * 8))
    assert compute == 0 and joint == pytest.approx(memory)


def test_splitting_reads_the_weights_of_two_products_again():
    """The output projection and gate_up, in so far as the rows would not have paid for them in one product."""
    pair = overlap_product.mixes(False)["1024 bf16 + 64 x 2048"]
    compute = 1e-3
    around = overlap_product.around(pair, compute)
    read, own = 2 * 4096 * (4096 + 28672) / BANDWIDTH, compute * 64 / 1024 * (4096 + 28672) / 28672
    assert around["again"] == pytest.approx(max(read - own, 0))
    assert overlap_product.around(pair, compute, 1.0)["again"] == pytest.approx(32768 / 28672 - own)
    parameters = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    layer = compute * 1088 / 1024 * parameters / (4096 * 28672)
    assert around["rest"] == pytest.approx(layer - compute)
    row = around | {"compute": compute, "memory": 1e-3, "joint": 1.5e-3}
    want = (around["rest"] + 2e-3) / (around["rest"] + 1.5e-3 + around["again"])
    assert overlap.gain(row) == pytest.approx(want)


def test_gathered_pages_give_the_same_attention():
    args = overlap_attention.arrays(TINY)
    want = hybrid_attention(*args, scale=TINY.head_dim**-0.5)[2:26]
    got = overlap_attention.gathered(TINY, *args, implementation="xla")[0]
    np.testing.assert_allclose(jnp.float32(got), jnp.float32(want), rtol=3e-2, atol=3e-2)


def test_the_timed_attention_is_the_same():
    args = overlap_attention.arrays(TINY)
    calls = overlap_attention.programs(TINY, [2.0], "xla")
    out = {name: np.asarray(call(*args)) for name, call in calls.items()}
    assert list(out) == ["compute", "memory", "sequence", "joint 2"]
    # The twin of the launch takes the platform's own kernels, which may round otherwise.
    np.testing.assert_allclose(
        jnp.float32(out["joint 2"]), jnp.float32(out["sequence"]), rtol=2**-7, atol=1e-6
    )
    np.testing.assert_array_equal(out["memory"][:2], out["sequence"][:2])
    np.testing.assert_array_equal(out["compute"][2:], out["sequence"][2:])


@pytest.mark.parametrize("low_bits", [False, True])
def test_the_timed_products_are_the_same(low_bits):
    pair = Pair(Beside(LowBitShape(5, 256, 64), PAGES), low_bits)
    args = overlap_product.arrays(pair, jnp.float32)
    out = {name: call(*args) for name, call in overlap_product.programs(pair, [2.0], "xla").items()}
    assert list(out) == ["compute", "memory", "own", "sequence", "joint 2"]
    for product in (out["own"], out["sequence"][0], out["joint 2"][0]):
        np.testing.assert_allclose(product, out["compute"], rtol=1e-5, atol=1e-4)
    for attended in (out["sequence"][1], out["joint 2"][1]):
        np.testing.assert_array_equal(attended, out["memory"])


def test_without_a_gpu_the_result_says_that_it_predicts(monkeypatch, capsys):
    monkeypatch.setattr(overlap, "occupancy", lambda case: {"registers": 255})
    result = overlap.run(quick=True, options=["--part", "attention", "--part", "product"])
    assert result.summary["measured"] == 0 and "predictions" in capsys.readouterr().out
    for row in result.rows:
        assert row["over_bound"] == pytest.approx(
            row["joint"] / (max(row["compute"], row["memory"]) + 0.3 * min(row["compute"], row["memory"]))
        )
    worst = max(row["over_bound"] for row in result.rows if row["useful"])
    assert result.summary["joint_over_bound"] == worst
    joint = overlap.joint_of([row for row in result.rows if row["part"] == "product" and row["useful"]])
    found = result.summary["product_joint_linear"], result.summary["product_joint_square"]
    assert found == (joint.linear, joint.square)
    kernels = ("hybrid_attention", "hybrid_matmul", "hybrid_matmul_w4a8")
    assert all(result.summary[f"{kernel}_registers"] == 255 for kernel in kernels)


def test_predicted_steps_are_made_of_the_predicted_parts():
    times = overlap_steps.predicted()
    shape = overlap_steps.SIZES[-1]
    found = {each.way: each for each in times.timings if each[1:3] == shape}
    pair = Pair(
        Beside(
            LowBitShape(shape[0] - shape[1], 4096, 28672), ListShape(32, 8, 128, 16, (2048,) * shape[1], 1)
        ),
        False,
    )
    compute, memory, joint = overlap_product.predicted(pair)
    again = overlap_product.around(pair, compute)["again"]
    saved = found[Way.WHOLE].seconds[1] - found[Way.PRODUCT].seconds[1]
    assert saved == pytest.approx(32 * (compute + memory - joint - again))
    rows = overlap_steps.rows(times)
    assert len(rows) == 3 * len(overlap_steps.SIZES) and all(row["step_gain"] >= 1 for row in rows)


def test_the_engine_serves_the_scaled_trace_under_both_policies(monkeypatch):
    config = dataclasses.replace(LLAMA, layers=1, hidden_size=32, heads=2, kv_heads=1, head_dim=16, mlp_width=32, vocab_size=128,
        context_length=16384, rope=RopeConfig(theta=1e4, dim=16), windows=(), moe_layers=())  # fmt: skip
    small = (
        "engine.max_seqs=8",
        "engine.max_tokens_per_step=512",
        "cache.memory=64MiB",
        "engine.max_context=10240",
    )
    times, row = overlap_engine.measured(config, small, requests=12, longest=24)
    assert times is None  # of a CPU, where nothing is measured
    assert row["blend_over_dfs"] == row["overlap_dfs_seconds"] / row["overlap_blend_seconds"]


def test_the_scaled_trace_has_the_density_and_the_sharing_that_it_names():
    requests = overlap_engine.trace(600, 128_256)
    prompts, answers = (
        np.array([len(each.prompt_ids) for each in requests], float),
        np.array([each.sampling.max_tokens for each in requests], float),
    )
    assert 550 < len(requests) < 650 and answers.max() <= 8000
    pages = {
        tuple(each.prompt_ids[: end * 16])
        for each in requests
        for end in range(1, len(each.prompt_ids) // 16 + 1)
    }
    computed = 16 * len(pages) + (prompts % 16).sum() + answers.sum()
    seconds = 2 * 8.03e9 / 989e12, 4 * 1024 * 32 / 4800e9  # of a token's compute, of a key's reading
    density = computed * seconds[0] / ((prompts * answers + answers**2 / 2).sum() * seconds[1])
    assert density == pytest.approx(overlap_engine.DENSITY, rel=0.15)
    total = (prompts + answers).sum()
    first = 57 * 608 / total  # what each subject's questions share is computed once
    assert 1 - computed / total == pytest.approx(overlap_engine.SHARE - first, rel=0.2)
