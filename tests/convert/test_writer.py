"""Cutting tensors into pieces, against plain NumPy."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.writer import blocks, part_size, pieces
from jaxinfer.models import storage_shapes, tensor_table
from jaxinfer.models.families import from_hugging_face

from folders import CONFIG, random_tensors  # isort: skip

MIB = 1 << 20


@st.composite
def views(draw):
    """Transposed views, as `TensorSpec.read` makes them."""
    shape = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    while np.prod(shape) > 20_000:
        shape.remove(max(shape))
    axes = draw(st.permutations(range(len(shape))))
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape).transpose(axes)


@given(views(), st.integers(1, 3000))
def test_blocks_tile_the_array_and_keep_the_limit(view, limit):
    filled = np.full(view.shape, -1, view.dtype)
    for start, block in blocks(view, limit):
        assert block.size <= limit
        place = filled[tuple(slice(at, at + n) for at, n in zip(start, block.shape))]
        assert (place == -1).all()
        place[...] = block
    np.testing.assert_array_equal(filled, view)


def test_blocks_are_runs_of_the_file():
    tensor = np.arange(64 * 32, dtype=np.int32).reshape(64, 32)
    for _, block in blocks(tensor.T, 256):
        assert block.T.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("size", [64, 1000, MIB])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_pieces_are_what_the_table_places(size, dtype):
    config, tensors = from_hugging_face(CONFIG), random_tensors()
    wanted = {path: np.full(shape, np.nan, np.float32) for path, shape in storage_shapes(config).items()}
    found = {path: np.full(array.shape, np.nan, dtype) for path, array in wanted.items()}
    for spec in tensor_table(config):
        spec.place(tensors[spec.name], wanted[spec.target])
        shape = wanted[spec.target].shape
        for piece, block in pieces(spec, tensors[spec.name], shape, np.dtype(dtype), size):
            assert block.dtype == dtype
            assert block.flags["C_CONTIGUOUS"]
            found[piece.leaf][tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape))] = block
    for path, array in wanted.items():
        np.testing.assert_array_equal(found[path], array.astype(dtype))


def test_part_size_leaves_room_below_twice_the_largest_tensor():
    assert all(3 * part_size(largest) <= largest for largest in (32 * MIB, 100 * MIB, 10_000 * MIB))
