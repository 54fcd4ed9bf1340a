"""packed_experts against a loop over tokens in float64, on what a record says its weights are."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.expert_mlp import expert_mlp
from pallas_kernels.packed_experts import Record, packed_experts
from pallas_kernels.packed_experts.host import HostExperts
from pallas_kernels.packed_experts.layout import FORMATS, GROUP, quantize

ACTIVATIONS = {
    "silu": lambda g: g / (1 + np.exp(-g)),
    "gelu_tanh": lambda g: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))),
}


def make(tokens, model_dim, hidden_dim, experts, top_k, format, seed=0, skip=0.2, group=GROUP):
    rng = np.random.default_rng(seed)
    record = Record(model_dim, hidden_dim, format, group)
    gate_up = rng.standard_normal((experts, model_dim, 2, hidden_dim), np.float32) * model_dim**-0.5
    down = rng.standard_normal((experts, hidden_dim, model_dim), np.float32) * hidden_dim**-0.5
    records = np.stack([record.pack(*weights) for weights in zip(gate_up, down, strict=True)])
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    ids[rng.random(ids.shape) < skip] = -1
    x = rng.standard_normal((tokens, model_dim), np.float32)
    return record, records, x, ids, rng.random(ids.shape, np.float32), gate_up, down


def run(record, records, x, ids, weights, implementation, activation="silu"):
    if implementation == "host":
        host = HostExperts(record, activation=activation, threads=2)
        out = host(x, records, ids, weights)
        host.close()
        return out
    arrays = map(jnp.asarray, (x, records, ids, weights))
    return np.asarray(
        packed_experts(*arrays, record=record, activation=activation, implementation=implementation)
    )


def rounded(matrix, format, group):
    """What is left of a float32 matrix [K, N] in a format, by the words of `layout`."""
    if format == "float32":
        return matrix
    if format == "bfloat16":
        return matrix.astype(ml_dtypes.bfloat16).astype(np.float32)
    largest = {"int8": 127, "int4": 7}[format]
    out = np.empty_like(matrix)
    for first in range(0, len(matrix), group):
        block = matrix[first : first + group]
        scale = np.abs(block).max(axis=0) / np.float32(largest)
        out[first : first + group] = np.rint(block / np.where(scale > 0, scale, 1)) * scale
    return out


def oracle(x, ids, weights, gate_up, down, format, activation="silu", group=GROUP):
    out = np.zeros(x.shape)
    for t, k in np.ndindex(*ids.shape):
        if (e := ids[t, k]) >= 0:
            gate, up, last = (
                rounded(part, format, group).astype(np.float64)
                for part in (gate_up[e][:, 0], gate_up[e][:, 1], down[e])
            )
            out[t] += weights[t, k] * ((ACTIVATIONS[activation](x[t] @ gate) * (x[t] @ up)) @ last)
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_equals_the_oracle(tokens, format, activation):
    record, records, x, ids, weights, gate_up, down = make(tokens, 144, 208, 4, 3, format)
    want = oracle(x, ids, weights, gate_up, down, format, activation)
    for implementation in ("xla", "cpu", "host"):
        got = run(record, records, x, ids, weights, implementation, activation)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_host_and_cpu_kernel_agree_in_every_bit_and_rows_stand_alone(format):
    record, records, x, ids, weights, *_ = make(40, 128, 352, 5, 2, format)
    together = run(record, records, x, ids, weights, "host")
    np.testing.assert_array_equal(together, run(record, records, x, ids, weights, "cpu"))
    for rows in (slice(0, 1), slice(3, 8), slice(11, 40)):
        alone = run(record, records, x[rows], ids[rows], weights[rows], "host")
        np.testing.assert_array_equal(alone, together[rows])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_activations_beside_a_huge_one_keep_what_float32_would(format):
    """Integers of 24 bits stand for activations: what is lost is 2^-23 of the group's largest, at most."""
    record, records, x, ids, weights, gate_up, down = make(3, 256, 64, 2, 1, format, skip=0)
    x[:, 7], x[1] = 3000, 0
    want = oracle(x, ids, weights, gate_up, down, format)
    got = run(record, records, x, ids, weights, "host")
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert not got[1].any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_in_its_row(format, bad):
    record, records, x, ids, weights, *_ = make(9, 144, 64, 2, 1, format, skip=0)
    right = run(record, records, x, ids, weights, "host")
    x[4, 140] = bad
    out = run(record, records, x, ids, weights, "host")
    assert not np.isfinite(out[4]).any()
    np.testing.assert_array_equal(np.delete(out, 4, 0), np.delete(right, 4, 0))


def test_float32_records_equal_expert_mlp_in_every_bit():
    record, records, x, ids, weights, gate_up, down = make(9, 64, 96, 4, 2, "float32")
    plain = expert_mlp(
        *map(jnp.asarray, (x, gate_up.reshape(4, 64, 192), down, ids, weights)), implementation="cpu"
    )
    np.testing.assert_array_equal(run(record, records, x, ids, weights, "cpu"), np.asarray(plain))


@given(
    st.integers(1, 9).map(lambda n: 16 * n),
    st.integers(1, 12).map(lambda n: 16 * n),
    st.integers(1, 20),
    st.sampled_from(FORMATS),
    st.sampled_from([16, 32, 64, GROUP]),
    st.integers(0, 2**31),
)
@settings(max_examples=12)
def test_any_shape(model_dim, hidden_dim, tokens, format, group, seed):
    shape = (tokens, model_dim, hidden_dim, 3, 2)
    record, records, x, ids, weights, gate_up, down = make(*shape, format, seed, group=group)
    assert records.shape == (3, record.nbytes)
    got = run(record, records, x, ids, weights, "host")
    want = oracle(x, ids, weights, gate_up, down, format, group=group)
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=3e-5)
    if record.scaled:
        parts = (gate_up[0][:, 0], gate_up[0][:, 1], down[0])
        codes = (quantize(part, 7 if format == "int4" else 127, group) for part in parts)
        np.testing.assert_array_equal(record.pack_codes(*codes), records[0])
    got = run(record, records, x, ids, weights, "xla")
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=3e-5)


def test_nothing_to_do():
    record, records, x, ids, weights, *_ = make(3, 32, 48, 2, 2, "int4")
    assert not run(record, records, x, np.full_like(ids, -1), weights, "host").any()
    assert not run(record, records, x, np.full_like(ids, -1), weights, "cpu").any()


@given(st.integers(1, 300), st.integers(1, 5), st.sampled_from([7, 127]), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_quantized_weights_are_at_most_half_a_step_away(rows, columns, largest, seed):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, columns), np.float32) * 10.0 ** rng.integers(-6, 6)
    weights[:, 0] = 0
    integers, scales = quantize(weights, largest)
    steps = np.repeat(scales, GROUP, axis=0)[:rows]
    assert np.abs(integers).max() <= largest and not integers[:, 0].any()
    assert (np.abs(integers * steps - weights) <= steps * 0.5001).all()


@pytest.mark.parametrize(
    "wrong", [(24, 32, "int4"), (32, 40, "float32"), (32, 32, "fp8"), (32, 32, "int4", 48)]
)
def test_what_a_record_cannot_hold(wrong):
    with pytest.raises(NotImplementedError):
        Record(*wrong)


def test_an_activation_that_the_kernel_does_not_know():
    record, records, x, ids, weights, *_ = make(1, 16, 16, 1, 1, "float32")
    for implementation in ("host", "cpu"):
        with pytest.raises(NotImplementedError, match="relu"):
            run(record, records, x, ids, weights, implementation, "relu")
    with pytest.raises(ValueError, match="relu"):
        run(record, records, x, ids, weights, "xla", "relu")
