"""The Hopper kernels against their XLA twins, in the simulator, with races looked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_page_attention as attention_tests
import test_page_bounds as bounds_tests
import test_page_scores as scores_tests
import test_page_select as select_tests

from pallas_kernels._mosaic import plgpu, simulator
from pallas_kernels.packed_pages import PackedPages, pack
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_attention import shapes as attention_shapes
from pallas_kernels.page_attention.shapes import ListShape
from pallas_kernels.page_bounds import page_bounds
from pallas_kernels.page_bounds import shapes as bounds_shapes
from pallas_kernels.page_scores import page_scores
from pallas_kernels.page_scores import shapes as scores_shapes
from pallas_kernels.page_select import page_select
from pallas_kernels.page_select import shapes as select_shapes


def both(op, *args, **kwargs):
    """Results of the simulated kernel and of the twin."""
    with simulator():
        got = jax.block_until_ready(op(*args, **kwargs, implementation="mosaic_gpu"))
    return got, op(*args, **kwargs, implementation="xla")


def test_the_simulator_finds_a_race():
    def both_write(out, tile):
        tile[...] = jnp.full((128,), jax.lax.axis_index("group"), jnp.float32)
        out[...] = tile[...]

    kernel = plgpu.kernel(
        both_write,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        num_threads=2,
        thread_name="group",
        scratch_types=(plgpu.SMEM((128,), jnp.float32),),
    )
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)race"), simulator():
        jax.block_until_ready(kernel())


@pytest.mark.parametrize("name", bounds_shapes.SIMULATED)
def test_page_bounds(name):
    shape = bounds_shapes.SIMULATED[name]
    bounds, k, slots = bounds_tests.make(shape, jnp.bfloat16)
    got, want = both(page_bounds, bounds, 1, k, jnp.asarray(slots), page_size=shape.page_size)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", bounds_shapes.SIMULATED)
def test_page_bounds_in_eight_bits(name):
    shape = bounds_shapes.SIMULATED[name]
    _, k, slots = bounds_tests.make(shape, jnp.bfloat16)
    k = k * jnp.arange(1, len(slots) + 1, dtype=k.dtype)[:, None, None]  # scales grow while a page fills
    sizes = (shape.layers, shape.pages, shape.kv_heads, shape.head_dim)
    bounds = bounds_tests.stale_scaled_bounds(np.random.default_rng(0), *sizes)
    for got, want in zip(*both(page_bounds, bounds, 1, k, jnp.asarray(slots), page_size=shape.page_size)):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("in_eight_bits", [False, True])
@pytest.mark.parametrize("name", scores_shapes.SIMULATED)
def test_page_scores(name, in_eight_bits):
    shape = scores_shapes.SIMULATED[name]
    q, bounds, *where = scores_tests.make(shape, jnp.bfloat16)
    bounds = scores_tests.in_eight_bits(bounds) if in_eight_bits else bounds
    scores = both(page_scores, q, bounds, *where, page_size=shape.page_size)
    for mine, want in zip(*(scores_tests.own_scores(s, shape) for s in scores)):
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-4)


def test_page_scores_below_the_bound():
    shape = scores_shapes.SIMULATED["llama3_8b_two_heads"]
    args = scores_tests.make(shape, jnp.bfloat16)
    scores = both(page_scores, *args, page_size=shape.page_size, spread=0.5)
    # The kernel's factors have the digits of a bfloat16.
    for mine, want in zip(*(scores_tests.own_scores(s, shape) for s in scores)):
        np.testing.assert_allclose(mine, want, atol=2**-8 * np.abs(want).max())


@pytest.mark.parametrize("name", select_shapes.SIMULATED)
def test_page_select(name):
    shape = select_shapes.SIMULATED[name]
    kind = "ties" if shape.group == 1 else "normal"
    scores, pages, keep = select_tests.make(shape, kind)
    settings = {"width": shape.keep, "first": shape.first, "last": shape.last, "scale": 0.125}
    got, want = both(page_select, scores, pages, keep, **settings)
    assert select_tests.chosen(got) == select_tests.chosen(want)


@pytest.mark.parametrize(("name", "kind"), [("one_head_2k", "ties"), ("group_32k", "normal")])
@pytest.mark.parametrize("top_p", [0.05, 0.15])
def test_page_select_by_weight(name, kind, top_p):
    shape = select_shapes.SIMULATED[name]
    scores, pages, keep = select_tests.make(shape, kind)
    settings = {"width": shape.keep, "first": shape.first, "last": shape.last, "scale": 0.125, "top_p": top_p}
    got, want = both(page_select, scores, pages, keep, **settings)
    assert select_tests.chosen(got) == select_tests.chosen(want)
    counts = np.asarray(want.number)[0]
    assert np.all((counts > shape.first + shape.last + 1) & (counts < shape.keep))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("pocket", 8),
        ("llama3_8b_two_heads", 4),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("pocket", 4),
                ("dense_page_32", 8),
                ("dense_page_32", 4),
                ("llama3_8b_two_heads", 8),
            )
        ),
    ],
)
def test_page_attention_over_packed_pools(name, bits):
    q, k, v, layer, lists, tokens = attention_tests.make(attention_shapes.SIMULATED[name], jnp.bfloat16)
    pools = (PackedPages(*pack(a, bits)) for a in (k, v))
    got, want = both(page_attention, q, *pools, layer, lists, tokens, scale=0.2)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2e-2, atol=1e-2
    )


@pytest.mark.parametrize("name", attention_shapes.SIMULATED)
def test_page_attention(name):
    args = attention_tests.make(attention_shapes.SIMULATED[name], jnp.bfloat16)
    got, want = both(page_attention, *args, scale=0.2)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2e-2, atol=1e-2
    )


def test_attention_feels_nothing_that_nobody_has_written():
    shape = attention_shapes.SIMULATED["llama2_7b_two_heads"]
    q, k_pages, v_pages, layer, lists, tokens = attention_tests.make(shape, jnp.bfloat16)
    dirty = [p.at[0].set(jnp.nan) for p in (k_pages, v_pages)]  # another layer
    last = np.asarray(lists)[1, :, 0]  # of the row of 15 tokens
    dirty = [p.at[1, last, :, 15].set(jnp.nan) for p in dirty]
    row = slice(1, 2)
    got, want = both(page_attention, q[row], *dirty, layer, lists[row], tokens[row], scale=0.2)
    assert not np.isnan(np.asarray(got, np.float32)).any()
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2e-2, atol=1e-2
    )


def test_attention_does_not_feel_its_neighbours():
    """Bit for bit, in a batch of another size and a wider list."""
    q, k_pages, v_pages, layer, lists, tokens = attention_tests.make(
        ListShape(2, 2, 64, 16, (700, 3), 2), jnp.bfloat16
    )
    row, wider = slice(0, 1), jnp.pad(lists, ((0, 0), (0, 0), (0, 9)))
    with simulator():
        together = page_attention(
            q, k_pages, v_pages, layer, lists, tokens, scale=0.2, implementation="mosaic_gpu"
        )
        alone = page_attention(
            q[row], k_pages, v_pages, layer, wider[row], tokens[row], scale=0.2, implementation="mosaic_gpu"
        )
        np.testing.assert_array_equal(alone, together[row])


def shape_of(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("q_heads", "head_dim", "page_size", "dtype", "message"),
    [
        (4, 128, 16, jnp.float32, "float32.*; bfloat16"),
        (4, 32, 16, jnp.bfloat16, "head dimension 32, page size 16; 64 or 128"),
        (4, 64, 8, jnp.bfloat16, "page size 8; 64 or 128, 16 or 32"),
        (34, 64, 16, jnp.bfloat16, "17 query heads to a KV head; at most 16"),
    ],
)
def test_limits_of_attention(q_heads, head_dim, page_size, dtype, message):
    pool = shape_of(1, 2, 2, page_size, head_dim, dtype=dtype)
    lists, tokens = shape_of(1, 2, 3, dtype=jnp.int32), shape_of(1, 2, dtype=jnp.int32)
    q = shape_of(1, q_heads, head_dim, dtype=dtype)
    with pytest.raises(NotImplementedError, match=message), simulator():
        page_attention(q, pool, pool, 0, lists, tokens, scale=1.0, implementation="mosaic_gpu")


def test_limits_of_selection():
    scores, row = shape_of(1, 1, 1, 8193, dtype=jnp.float32), jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="8193 pages"), simulator():
        page_select(scores, row, row, width=4, implementation="mosaic_gpu")


def test_limits_of_bounds_and_scores():
    bounds, row = shape_of(1, 2, 1, 2, 32), jnp.zeros(1, jnp.int32)
    settings = {"page_size": 16, "implementation": "mosaic_gpu"}
    with pytest.raises(NotImplementedError, match="head dimension 32"), simulator():
        page_scores(shape_of(1, 4, 32), bounds, 0, row[None], row, **settings)
    with pytest.raises(NotImplementedError, match="head dimension 32"), simulator():
        page_bounds(bounds, 0, shape_of(1, 1, 32), row, **settings)


def test_without_a_hopper_gpu_the_kernels_say_so():
    shape = attention_shapes.SIMULATED["paper"]
    args = attention_tests.make(shape, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="H200"):
        page_attention(*args, scale=0.2, implementation="mosaic_gpu")
