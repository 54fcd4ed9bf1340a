"""The Hopper kernel of ragged_attention against its XLA twin, in the simulator, with races looked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_ragged_attention as ragged_tests
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels._mosaic import simulator
from pallas_kernels.packed_pages import PackedPages, pack, unpack
from pallas_kernels.ragged_attention import ragged_attention
from pallas_kernels.ragged_attention._query_tiles import END, FIRST, LENGTH, POSITION, ROW, TOKEN, query_tiles
from pallas_kernels.ragged_attention.shapes import SIMULATED, AttentionShape


def simulated(*args, window=0):
    with simulator():
        out = ragged_attention(*args, scale=0.2, window=window, implementation="mosaic_gpu")
        return np.asarray(jax.block_until_ready(out), np.float32)


@pytest.mark.parametrize(
    ("name", "window"), [("pocket", 0), ("llama3_8b_two_heads", 50), ("page_32", 0), ("one_kv_head", 7)]
)
def test_matches_its_twin(name, window):
    args = ragged_tests.make(SIMULATED[name], jnp.bfloat16)
    want = ragged_attention(*args, scale=0.2, window=window, implementation="xla")
    got = simulated(*args, window=jnp.int32(window))
    np.testing.assert_allclose(got, np.asarray(want, np.float32), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("name", "bits", "window"), [("pocket", 8, 0), ("page_32", 4, 50)])
def test_packed_pools(name, bits, window):
    """Against attention over what the codes stand for in bfloat16; where nothing is written, steps and smallest values are NaN."""
    q, k_pages, v_pages, layer, table, *rows = ragged_tests.make(SIMULATED[name], jnp.bfloat16)
    pools = [PackedPages(*pack(pages, bits)) for pages in (k_pages, v_pages)]
    row = int(jnp.argmax(rows[2]))
    last, held = divmod(int(rows[2][row]), k_pages.shape[3])
    dirty = [p._replace(words=p.words.at[1, table[row, last], :, held:].set(-1)) for p in pools]
    got = simulated(q, *dirty, layer, table, *rows, window=window)
    opened = [unpack(*pool, bits).astype(jnp.bfloat16) for pool in pools]
    want = ragged_attention(q, *opened, layer, table, *rows, scale=0.2, window=window, implementation="xla")
    np.testing.assert_allclose(got, np.asarray(want, np.float32), rtol=2e-2, atol=1e-2)


def test_what_nobody_has_written_has_no_influence():
    q, k_pages, v_pages, layer, table, *rows = ragged_tests.make(
        AttentionShape(2, 1, 64, 16, ((3, 21), (2, 64))), jnp.bfloat16
    )
    dirty = [pages.at[0].set(jnp.nan) for pages in (k_pages, v_pages)]  # another layer
    dirty = [pages.at[1, table[0, 1], :, 5:].set(jnp.nan) for pages in dirty]  # of the row of 21 keys
    dirty = [pages.at[1, 0].set(jnp.inf) for pages in dirty]  # the page of padding
    clean = simulated(q, k_pages, v_pages, layer, table, *rows)
    np.testing.assert_array_equal(simulated(q, *dirty, layer, table, *rows), clean)


def test_a_row_does_not_feel_its_neighbours_or_its_chunking():
    """Bit for bit: alone and in two chunks."""
    shape = AttentionShape(4, 1, 64, 16, ((45, 140), (5, 5)))
    q, k_pages, v_pages, layer, table, start, length, kv_len = ragged_tests.make(shape, jnp.bfloat16)
    together = simulated(q, k_pages, v_pages, layer, table, start, length, kv_len)
    first = jnp.array([21, 24])  # tokens of the chunks
    chunks = (start[0] + jnp.array([0, 21]), first, kv_len[0] - jnp.array([24, 0]))
    halves = simulated(q, k_pages, v_pages, layer, table[jnp.array([0, 0])], *chunks)
    mine = slice(int(start[0]), int(start[0] + length[0]))
    np.testing.assert_array_equal(halves[mine], together[mine])


MOST_ROWS, MOST_TOKENS = 6, 416
cut = jax.jit(query_tiles, static_argnames=("tokens", "size"))
row = st.tuples(st.integers(0, 9), st.integers(0, 60), st.integers(0, 70))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row, max_size=MOST_ROWS), size=st.sampled_from([8, 16, 40]))
def test_tiles_hold_every_token_once(rows, size):
    """Rows of (tokens of nobody before it, tokens, keys before them)."""
    starts, counts, keys, at = [], [], [], 0
    for gap, count, before in rows + [(0, 0, 0)] * (MOST_ROWS - len(rows)):
        starts.append(at + gap)
        counts.append(count)
        keys.append(before + count)
        at += gap + count
    arrays = (jnp.array(a, jnp.int32) for a in (starts, counts, keys))
    tiles, slots = cut(*arrays, tokens=MOST_TOKENS, size=size)
    held = {}
    for number, tile in enumerate(np.asarray(tiles)):
        row, token, position = tile[ROW], tile[TOKEN], tile[POSITION]
        if tile[END] == 0:
            continue
        assert token % 8 == 0 and 0 <= token <= MOST_TOKENS - size and tile[LENGTH] == keys[row]
        assert position <= tile[FIRST] < tile[END] <= position + size
        for p in range(tile[FIRST], tile[END]):
            flat = token + p - position
            assert flat not in held and flat - starts[row] == p - (keys[row] - counts[row])
            held[flat] = number * size + p - position
    owned = [t for start, count in zip(starts, counts) for t in range(start, start + count)]
    assert sorted(held) == owned
    assert slots.tolist() == [held.get(t, len(tiles) * size) for t in range(MOST_TOKENS)]


@pytest.mark.parametrize(
    ("q_heads", "head_dim", "page_size", "kind", "message"),
    [
        (4, 128, 16, "float32", "float32.*; bfloat16"),
        (4, 128, 16, "packed", "bfloat16, 8 bits, 4 bits; bfloat16, or both packed alike"),
        (4, 64, 16, "int4", "4 bits of head dimension 64; 128"),
        (4, 32, 16, "bfloat16", "head dimension 32, page size 16; 64 or 128"),
        (4, 64, 8, "bfloat16", "page size 8; 64 or 128, 16 or 32"),
        (34, 64, 16, "bfloat16", "17 query heads to a KV head; at most 16"),
    ],
)
def test_limits(q_heads, head_dim, page_size, kind, message):
    bits = {"packed": (8, 4), "int4": (4, 4)}.get(kind, ())
    dtype = jnp.dtype("bfloat16" if bits else kind)
    pool = jnp.zeros((1, 2, 2, page_size, head_dim), dtype)
    pools = [PackedPages(*pack(pool, b)) for b in bits] or [pool, pool]
    rows = jnp.zeros(1, jnp.int32)
    q = jnp.zeros((8, q_heads, head_dim), dtype)
    with pytest.raises(NotImplementedError, match=message), simulator():
        ragged_attention(q, *pools, 0, rows[None], rows, rows, rows, scale=1.0, implementation="mosaic_gpu")


def test_a_scale_that_turns_the_order_of_scores_is_refused():
    q, pool, rows = (
        jnp.zeros((8, 1, 64), "bfloat16"),
        jnp.zeros((1, 2, 1, 16, 64), "bfloat16"),
        jnp.zeros(1, int),
    )
    with pytest.raises(NotImplementedError, match="scale -1; above 0"), simulator():
        ragged_attention(
            q, pool, pool, 0, rows[None], rows, rows, rows, scale=-1, implementation="mosaic_gpu"
        )


def test_without_a_hopper_gpu_the_kernel_says_so():
    args = ragged_tests.make(SIMULATED["pocket"], jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="H200"):
        ragged_attention(*args, scale=0.2, implementation="mosaic_gpu")
