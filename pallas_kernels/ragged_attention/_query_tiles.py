"""Ragged rows cut into tiles of queries, on the device: how many tiles a row has is known there only."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class QueryTiles(NamedTuple):
    """Tiles of `size` tokens; a static number of them, which is enough for any rows: those left over are empty.

    tiles: int32 [tiles, 6], the fields of each tile, see below
    slots: int32 [T], where the output of a token lies among the tiles' rows; tiles * size for tokens that no row owns
    """

    tiles: jax.Array
    slots: jax.Array


# A tile takes the flat tokens TOKEN .. TOKEN + size, of which the first is at POSITION of ROW (negative before the row
# begins) and those at positions FIRST .. END are its own; the row has LENGTH keys; an empty tile ends at 0.
ROW, TOKEN, POSITION, FIRST, END, LENGTH = range(6)
# TOKEN is a multiple of it: copies into tiled shared memory begin at whole tiles.
ALIGNED = 8


def query_tiles(query_start, query_len, kv_len, *, tokens: int, size: int) -> QueryTiles:
    """Rows as in `api.ragged_attention`; tokens, size: multiples of ALIGNED, tokens >= size."""
    rows = query_len.shape[0]
    query_len = jnp.clip(query_len, 0, kv_len)
    aligned = query_start // ALIGNED * ALIGNED
    ends = jnp.cumsum(jnp.where(query_len > 0, -(-(query_start + query_len - aligned) // size), 0))
    # A row that owns a token has no more than its tokens, ALIGNED - 1 before them and size - 1 after them.
    tiles = max(1, (tokens + min(rows, tokens) * (ALIGNED + size - 2)) // size)

    number = jnp.arange(tiles)
    row = jnp.searchsorted(ends, number, side="right", method="compare_all")
    real, row = row < rows, jnp.minimum(row, rows - 1)
    # A row's last tile sees the most keys, so it goes first.
    wanted = aligned[row] + (ends[row] - 1 - number) * size
    token = jnp.clip(wanted, 0, tokens - size)
    start = query_start[row]
    before = kv_len[row] - query_len[row] - start  # from flat tokens to positions
    first = jnp.maximum(wanted, start) + before
    end = jnp.minimum(wanted + size + before, kv_len[row])
    fields = jnp.stack([row, token, token + before, first, end, kv_len[row]], axis=1)

    flat = jnp.arange(tokens)
    since = flat[:, None] - query_start
    owned = (since >= 0) & (since < query_len)
    owner = jnp.argmax(owned, axis=1)
    tile = ends[owner] - 1 - (flat - aligned[owner]) // size
    slots = jnp.where(owned.any(axis=1), tile * size + flat - token[tile], tiles * size)
    return QueryTiles(jnp.where(real[:, None], fields, 0).astype(jnp.int32), slots.astype(jnp.int32))
