"""quantize and int4_matmul against plain numpy: integers exactly, everything else to rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.int4_matmul import PackedMatrix, int4_matmul, pack, unpack
from pallas_kernels.int4_matmul.shapes import SHAPES, LowBitShape
from pallas_kernels.quantize import QuantizedRows, quantize

MODES = ("w4a4", "w4a8", "w4a16", "w8a8")


def draw(shape, mode, seed=0):
    """Activations and weights of one call, as numpy arrays in the fields of QuantizedRows and PackedMatrix."""
    rng = np.random.default_rng(seed)
    outputs, lead = shape.outputs, (shape.experts,) if shape.experts else ()
    inputs = shape.inputs
    low_channels = 0 if mode == "w8a8" else inputs - shape.outliers
    high_channels = inputs - low_channels
    groups = low_channels // (shape.group or low_channels) if low_channels else 0
    low = scale = channel = high = high_scale = None
    codes = rng.integers(-8, 8, (*lead, outputs, low_channels), np.int8)
    if low_channels:
        low = pack(codes, low_channels // groups)
        if mode == "w4a8":
            scale = rng.integers(1, 16, (*lead, outputs, groups), np.uint8)
            channel = rng.uniform(0.001, 0.002, (*lead, outputs)).astype(np.float32)
        else:
            rows = 2 if mode == "w4a4" else 1
            scale = rng.uniform(0.001, 0.01, (*lead, outputs // rows, groups)).astype(np.float32)
    if high_channels:
        high = rng.integers(-127, 128, (*lead, outputs, high_channels), np.int8)
        high_scale = rng.uniform(0.0001, 0.001, (*lead, outputs)).astype(np.float32)
    m = shape.rows
    if mode == "w4a16":
        x = [rng.standard_normal((m, c), np.float32) for c in (low_channels, high_channels)]
        rows = QuantizedRows(x[0], None, x[1] if high_channels else None, None)
    else:
        most = 8 if mode == "w4a4" else 127
        scales = groups if mode == "w4a4" else 1
        rows = QuantizedRows(
            rng.integers(-most, most, (m, low_channels), np.int8) if low_channels else None,
            rng.uniform(0.01, 0.1, (m, scales)).astype(np.float32) if low_channels else None,
            rng.integers(-127, 128, (m, high_channels), np.int8) if high_channels else None,
            rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32) if high_channels else None,
        )
    sizes = None
    if shape.experts:
        sizes = np.bincount(rng.integers(0, shape.experts, m), minlength=shape.experts).astype(np.int32)
        sizes[-1] -= min(1, sizes[-1])  # rows that belong to nobody come last
    return rows, PackedMatrix(low, scale, channel, high, high_scale), codes, sizes


def weights_of(w: PackedMatrix, codes):
    """float64 [..., N, K]"""
    parts = []
    if w.low is not None:
        scale = np.repeat(w.scale.astype(np.float64), codes.shape[-2] // w.scale.shape[-2], axis=-2)
        if w.channel is not None:
            scale = scale * w.channel.astype(np.float64)[..., None]
        parts.append(codes * np.repeat(scale, codes.shape[-1] // scale.shape[-1], axis=-1))
    if w.high is not None:
        parts.append(w.high * w.high_scale.astype(np.float64)[..., None])
    return np.concatenate(parts, axis=-1)


def values_of(x: QuantizedRows):
    """float64 [M, K]"""
    parts = []
    for codes, scale in ((x.low, x.low_scale), (x.high, x.high_scale)):
        if codes is not None and scale is None:
            parts.append(codes.astype(np.float64))
        elif codes is not None:
            parts.append(
                codes * np.repeat(scale.astype(np.float64), codes.shape[1] // scale.shape[1], axis=1)
            )
    return np.concatenate(parts, axis=1)


def oracle(x, w, codes, sizes):
    values, weights = values_of(x), weights_of(w, codes)
    if sizes is None:
        return values @ weights.T
    out = np.zeros((len(values), weights.shape[1]))
    ends = np.cumsum(sizes)
    for e, end in enumerate(ends):
        rows = slice(end - sizes[e], end)
        out[rows] = values[rows] @ weights[e].T
    return out


def check(shape, mode, implementation, seed=0):
    x, w, codes, sizes = draw(shape, mode, seed)
    want = oracle(x, w, codes, sizes)
    got = jax.jit(lambda x, w, s: int4_matmul(x, w, s, implementation=implementation))(x, w, sizes)
    assert got.dtype == jnp.float32
    spread = np.sqrt(np.mean(np.square(want)))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * spread)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(SHAPES))
def test_real_shapes(name, mode, implementation):
    check(SHAPES[name], mode, implementation)


@pytest.mark.parametrize("name", list(SHAPES))
def test_float_activations_on_the_cpu(name):
    check(dataclasses.replace(SHAPES[name], outliers=0), "w4a16", "cpu")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    blocks=st.integers(1, 6),
    outputs=st.integers(1, 40),
    group=st.sampled_from([16, 32, 48, 64, 128]),
    outliers=st.sampled_from([0, 16, 48, 128]),
    experts=st.sampled_from([0, 1, 3]),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 9),
)
def test_any_shape(rows, blocks, outputs, group, outliers, experts, mode, seed):
    shape = LowBitShape(rows, blocks * group + outliers, 2 * outputs, group, outliers, experts)
    check(shape, mode, None, seed)


def test_rows_of_no_matrix_are_zeros_beside_a_single_one():
    x, w, codes, _ = draw(LowBitShape(300, 256, 512, 128, 128, 1), "w4a8")
    jax.block_until_ready([jnp.full((300, 512), np.nan) for _ in range(8)])  # what freed memory then holds
    got = jax.jit(lambda x, w, s: int4_matmul(x, w, s))(x, w, np.int32([2]))
    np.testing.assert_allclose(got, oracle(x, w, codes, [2]), rtol=2e-5, atol=2e-4)


def test_no_rows_at_all():
    _, w, _, _ = draw(LowBitShape(3, 160, 24, 16, 32), "w4a4")
    rows = quantize(jnp.zeros((0, 160)), bits=4, group=16, outliers=32)
    assert rows.low.shape == (0, 128) and rows.low_scale.shape == (0, 8)
    assert int4_matmul(rows, w).shape == (0, 24)


def test_one_group_of_all_channels():
    check(LowBitShape(3, 400, 24, 0, 16), "w4a4", None)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_does_not_feel_the_others(mode):
    x, w, _, _ = draw(LowBitShape(33, 640, 96, 128, 0 if mode == "w4a16" else 128), mode)
    together = np.asarray(int4_matmul(x, w))
    for rows in (slice(0, 1), slice(4, 9), slice(13, 33)):
        few = jax.tree.map(lambda a, rows=rows: a[rows], x)
        np.testing.assert_array_equal(int4_matmul(few, w), together[rows])


@given(group=st.sampled_from([16, 32, 48, 128, 256]), blocks=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_unpack_reverses_pack(group, blocks, seed):
    codes = np.random.default_rng(seed).integers(-8, 8, (3, group * blocks), np.int8)
    packed = pack(codes, group)
    assert packed.dtype == np.uint8 and packed.size == codes.size // 2
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), group), codes)


def test_a_packed_byte_holds_both_halves_of_a_block():
    codes = np.zeros((1, 32), np.int8)
    codes[0, [3, 16 + 3]] = (-8, -1)
    packed = pack(codes, 32)[0]
    assert packed[3] & 15 == 0 and np.int8(np.uint8(packed[3] & 0xF0).view(np.int8)) == -16
    assert packed[4] & 15 == 8 and packed[4] >> 4 == 0


def authors_rows(x, order, bits, group, clip, outliers):
    """Group by group, as the paper's simulation does."""
    x = x[:, order].astype(np.float32)
    codes, scales = np.zeros(x.shape, np.int64), []
    kept = x.shape[1] - outliers
    for begin in range(0, kept, group):
        part = x[:, begin : begin + group]
        scale = np.float32(clip) * np.maximum(np.abs(part).max(1, keepdims=True), np.float32(1e-5))
        scale = scale / np.float32(2 ** (bits - 1) - 1)
        codes[:, begin : begin + group] = np.clip(
            np.rint(part / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        )
        scales.append(scale)
    scale = np.maximum(np.abs(x[:, kept:]).max(1, keepdims=True), np.float32(1e-5)) / np.float32(127)
    codes[:, kept:] = np.clip(np.rint(x[:, kept:] / scale), -128, 127)
    return codes, np.concatenate(scales, 1), scale


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize(("bits", "clip", "group"), [(4, 0.9, 32), (4, 1.0, 96), (8, 1.0, 96)])
def test_quantize_is_the_authors_scheme(bits, clip, group, implementation):
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((7, 128), np.float32) * rng.lognormal(0, 2, (1, 128)).astype(np.float32)
    x[3] = 0
    order = rng.permutation(128).astype(np.int32)
    codes, scales, high_scale = authors_rows(x, order, bits, group, clip, 32)
    settings = {"bits": bits, "group": group, "clip": clip, "outliers": 32}
    got = quantize(jnp.asarray(x), jnp.asarray(order), implementation=implementation, **settings)
    np.testing.assert_array_equal(np.concatenate([got.low, got.high], 1), codes)
    np.testing.assert_allclose(got.low_scale, scales, rtol=1e-6)
    np.testing.assert_allclose(got.high_scale, high_scale, rtol=1e-6)


def test_sixteen_bits_are_left_alone():
    x = jnp.arange(12.0).reshape(2, 6)
    got = quantize(x, jnp.asarray([5, 4, 3, 2, 1, 0]), bits=16, outliers=2, outlier_bits=16)
    np.testing.assert_array_equal(got.low, x[:, ::-1][:, :4])
    np.testing.assert_array_equal(got.high, x[:, ::-1][:, 4:])
    assert got.low_scale is None and got.high_scale is None


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "w4a16"])
def test_every_call_gives_the_same(mode):
    x, w, _, sizes = draw(LowBitShape(21, 640, 1024, 128, 128, 4), mode)
    run = jax.jit(int4_matmul)
    first = np.asarray(run(x, w, sizes))
    for _ in range(20):
        np.testing.assert_array_equal(run(x, w, sizes), first)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("mode", MODES)
def test_weights_are_never_opened_as_a_whole(mode, implementation):
    x, w, _, _ = draw(LowBitShape(8, 1152, 8192, 128, 0 if mode == "w4a16" else 128), mode)
    compiled = jax.jit(lambda x, w: int4_matmul(x, w, implementation=implementation)).lower(x, w).compile()
    as_floats = 4 * 1152 * 8192
    assert compiled.memory_analysis().temp_size_in_bytes < as_floats / 4
