"""Rounding of weights against the authors' scheme, on random weights and on trained ones."""

import dataclasses

import authors
import jax
import numpy as np
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.llm import EMBEDDED_MODEL
from jaxinfer.models.checkpoint import load_model
from jaxinfer.quant.clip import GRID, output_error, search_clip
from jaxinfer.quant.form import Quantization
from jaxinfer.quant.gptq import gptq
from jaxinfer.quant.matrices import packed, relative_error, round_matrix
from jaxinfer.quant.order import channel_order, outlier_share
from jaxinfer.quant.rotation import hadamard, rotate, rotate_weights
from jaxinfer.quant.rounding import FINEST, round_nearest

ATOM = Quantization(mode="atom-w4a4", group=16, outliers=32)
TWO_LEVEL = Quantization(
    mode="atom-w4a8", activation_bits=8, rows=1, two_level=True, weight_clip=0, group=16, outliers=32
)


@pytest.fixture(scope="module")
def trained():
    return load_model(EMBEDDED_MODEL, dtype="float32", layout="unstacked")[1]


def matrix(source, trained):
    """Weights [N, K] and inputs [n, K], channels sorted."""
    rng = np.random.default_rng(7)
    if source == "random":
        w = rng.standard_normal((24, 160), np.float32)
    else:
        layer = trained.runs[0][2]
        w = np.asarray(layer.attention.qkv if source == "qkv" else layer.mlp.gate_up[3])
        w = w.reshape(w.shape[0], -1).T[-48:]
    mixed = rng.standard_normal((w.shape[1] // 2, w.shape[1])) * rng.lognormal(0, 1, w.shape[1])
    x = rng.standard_normal((400, len(mixed))) @ mixed + rng.standard_normal((400, w.shape[1]))
    order = authors.order_of(x)
    np.testing.assert_array_equal(channel_order((x**2).sum(0)), order)
    return np.ascontiguousarray(w[:, order]), x[:, order]


def check(got, codes, scales, high):
    np.testing.assert_array_equal(np.concatenate([got.codes, got.high], 1), codes)
    np.testing.assert_allclose(got.scale, scales, rtol=1e-5)
    np.testing.assert_allclose(got.high_scale, high, rtol=1e-5)


@pytest.mark.parametrize("source", ["random", "qkv", "expert"])
def test_rounding_to_nearest_is_the_authors(source, trained):
    w, _ = matrix(source, trained)
    form = dataclasses.replace(ATOM, method="rtn")
    check(round_nearest(w, form, 0.85), *authors.rtn(w, 16, 0.85, 32))


@pytest.mark.parametrize("source", ["random", "qkv", "expert"])
def test_gptq_is_the_authors(source, trained):
    w, x = matrix(source, trained)
    rounded = authors.round_rows(x, 4, 16, 0.9, 32)
    hessian = 2 / len(x) * rounded.T @ rounded
    check(gptq(w, hessian, ATOM, 0.85), *authors.gptq(w, hessian, 16, 0.85, 32))


def test_gptq_with_dead_channels_and_one_group(trained):
    w, x = matrix("random", trained)
    x[:, [0, 5, 77]] = 0
    hessian = 2 / len(x) * x.T @ x
    got = gptq(w, hessian, ATOM, 0.85)
    check(got, *authors.gptq(w, hessian, 16, 0.85, 32))
    assert not got.weights()[:, [0, 5, 77]].any()
    whole = dataclasses.replace(ATOM, group=0)
    check(gptq(w, hessian, whole, 0.85), *authors.gptq(w, hessian, 128, 0.85, 32))


@pytest.mark.parametrize("group", [48, 80, 96, 144])
def test_gptq_with_groups_that_do_not_divide_its_blocks(group):
    rng = np.random.default_rng(group)
    channels = 3 * group + 32
    w = rng.standard_normal((6, channels)).astype(np.float32)
    x = rng.standard_normal((500, channels)) * rng.lognormal(0, 1, channels)
    form = dataclasses.replace(ATOM, group=group)
    check(gptq(w, x.T @ x, form, 0.85), *authors.gptq(w, x.T @ x, group, 0.85, 32))


def test_matrices_of_zeros_and_singular_moments(trained):
    _, x = matrix("random", trained)
    moments = x.T @ x
    got, _ = round_matrix(np.zeros((4, 160), np.float32), moments, ATOM)
    assert not got.weights().any() and np.isfinite(got.scale).all()
    assert np.isnan(relative_error(np.zeros((4, 160)), got, moments))
    few, w = x[:3].T @ x[:3], np.ones((4, 160), np.float32)
    assert relative_error(w, round_matrix(w, few, ATOM)[0], few) < 0.2
    with pytest.raises(ConfigError, match=r"damping = 1e-18 is too small"):
        round_matrix(w, few, dataclasses.replace(ATOM, damping=1e-18))


def test_gptq_changes_outputs_less_than_rounding_to_nearest(trained):
    w, x = matrix("qkv", trained)
    hessian = x.T @ x
    for form in (ATOM, TWO_LEVEL):
        near = round_nearest(w, dataclasses.replace(form, method="rtn"), 0.9).weights()
        mended = gptq(w, hessian, form, 0.9).weights()
        assert output_error(w, mended, hessian) < 0.8 * output_error(w, near, hessian)


def test_two_levels_are_eight_bit_integers(trained):
    w, x = matrix("qkv", trained)
    got = gptq(w, x.T @ x, TWO_LEVEL, 0.9)
    assert got.scale.dtype == np.uint8 and got.scale.min() >= 1 and got.scale.max() <= FINEST
    fine = got.codes.astype(int) * np.repeat(got.scale.astype(int), 16, axis=1)
    assert np.abs(fine).max() <= 127
    np.testing.assert_allclose(fine * got.channel[:, None], got.weights()[:, :-32], rtol=1e-6)


def test_the_searched_clip_is_the_best_of_the_grid(trained):
    w, x = matrix("expert", trained)
    hessian = x.T @ x
    best = search_clip(w, hessian, TWO_LEVEL)
    errors = [output_error(w, round_nearest(w, TWO_LEVEL, clip).weights(), hessian) for clip in GRID]
    assert best == GRID[int(np.argmin(errors))]


def test_weights_without_inputs_are_rounded_to_nearest(trained):
    w, _ = matrix("random", trained)
    nothing = np.zeros((160, 160))
    for moments in (nothing, None):
        got, clip = round_matrix(w, moments, ATOM)
        np.testing.assert_array_equal(got.codes, round_nearest(w, ATOM, 0.85).codes)
        assert clip == 0.85


def test_packed_matrices_multiply_as_what_they_stand_for(trained):
    w, x = matrix("random", trained)
    x = x[:9].astype(np.float32)
    back = np.argsort(np.random.default_rng(0).permutation(160)).astype(np.int32)
    for form in (
        ATOM,
        TWO_LEVEL,
        dataclasses.replace(ATOM, outlier_bits=16),
        dataclasses.replace(ATOM, group=0),
    ):
        rounded, _ = round_matrix(w, x.T @ x + np.eye(160), form)
        array = jax.tree.map(lambda leaf: leaf[0], packed([rounded], back, (160,), (24,), form))
        assert array.shape == (160, 24)
        unsorted = np.empty_like(x)
        unsorted[:, back] = x
        got = np.asarray(array.multiply(unsorted))
        want = np.asarray(array.rows(unsorted).values(), np.float64) @ rounded.weights().T
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_rotation_is_orthogonal_and_leaves_products_alone():
    rng = np.random.default_rng(1)
    for channels in (48, 128, 768):
        x, w = rng.standard_normal((3, channels)), rng.standard_normal((5, channels))
        turned = np.asarray(rotate(np.asarray(x, np.float32)), np.float64)
        np.testing.assert_allclose(turned @ rotate_weights(w).T, x @ w.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(hadamard(64) @ hadamard(64), np.eye(64), atol=1e-6)
    spike = np.zeros((1, 64), np.float32)
    spike[0, 5] = 8
    np.testing.assert_allclose(np.abs(rotate(spike)), 1)


def test_outlier_share():
    assert outlier_share(np.array([1.0, 5.0, 1.0, 3.0]), 2) == 0.8
    assert outlier_share(np.zeros(4), 2) == 0
