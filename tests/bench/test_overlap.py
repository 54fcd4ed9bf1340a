"""What the overlap bench counts and predicts, and that its baseline computes the same attention."""

import jax.numpy as jnp
import numpy as np
import pytest

from bench import overlap
from jaxinfer.schedule.profile import MAX, SUM
from pallas_kernels.hybrid_attention import hybrid_attention
from pallas_kernels.hybrid_attention.shapes import MixedShape

TINY = MixedShape(4, 2, 64, 16, ((24, 40),), (33, 7), 1)


def test_work_is_counted_tile_by_tile():
    shape = MixedShape(32, 8, 128, 16, ((70, 100), (5, 5)), (300, 64), 8)
    flops = 0
    for tokens, length in shape.chunks:
        for first in range(0, tokens, 32):  # 128 rows, four heads
            last = length - tokens + min(first + 32, tokens)
            steps = len(range(0, last, 64))
            flops += steps * 2 * (2 * 128 * 64 * 128) * 8
    read = 2 * (300 + 64) * 128 * 2 * 8
    partial = (2 + 1) * 8 * 2 * (4 * 128 * 4 + 2 * 16 * 4)  # parts of 256 tokens, written and read
    assert overlap.Work.of(shape) == overlap.Work(flops, read + partial)


@pytest.mark.parametrize("shape", overlap.mixes(False).values(), ids=str)
def test_both_take_as_long_as_the_longer_and_no_longer_than_the_sum(shape):
    compute, memory, joint = overlap.predicted(shape)
    assert MAX(compute, memory) <= joint <= SUM(compute, memory)


def test_a_role_alone_takes_its_own_time():
    compute, memory, joint = overlap.predicted(MixedShape(32, 8, 128, 16, ((512, 512),), ()))
    assert memory == 0 and joint == pytest.approx(compute)
    compute, memory, joint = overlap.predicted(MixedShape(32, 8, 128, 16, (), (4096,) * 8))
    assert compute == 0 and joint == pytest.approx(memory)


def test_gathered_pages_give_the_same_attention():
    args = overlap.arrays(TINY)
    want = hybrid_attention(*args, scale=TINY.head_dim**-0.5)[2:26]
    got = overlap.gathered(TINY, *args, implementation="xla")[0]
    np.testing.assert_allclose(jnp.float32(got), jnp.float32(want), rtol=3e-2, atol=3e-2)


def test_what_is_timed_computes_the_same():
    args = overlap.arrays(TINY)
    out = {name: np.asarray(call(*args)) for name, call in overlap.programs(TINY, [2.0], "xla").items()}
    assert list(out) == ["compute", "memory", "sequence", "joint 2"]
    np.testing.assert_array_equal(out["joint 2"], out["sequence"])
    np.testing.assert_array_equal(out["memory"][:2], out["sequence"][:2])
    np.testing.assert_array_equal(out["compute"][2:], out["sequence"][2:])


def test_without_a_gpu_the_result_says_that_it_predicts(monkeypatch, capsys):
    monkeypatch.setattr(overlap, "_occupancy", dict)
    result = overlap.run(quick=True, options=[])
    assert result.summary["measured"] == 0 and "predictions" in capsys.readouterr().out
    for row in result.rows:
        assert row["over_bound"] == pytest.approx(
            row["joint"] / (max(row["compute"], row["memory"]) + 0.3 * min(row["compute"], row["memory"]))
        )
    joint = overlap.joint_of(result.rows)
    assert (result.summary["joint_linear"], result.summary["joint_square"]) == (joint.linear, joint.square)
