"""A rank's slice of a flattened parameter as rectangles of the whole."""

import math
import random

import numpy as np
import pytest

from megatron_moe_lpr.checkpoint.saving.optimizer_state import rectangles

SHAPES = [(), (1,), (7,), (5, 3), (1, 6), (6, 1), (2, 3, 4), (3, 1, 5), (2, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rectangles_are_the_slice_in_order(shape):
    """Each is one run of memory, and together, one after the other, they are exactly the slice."""
    size = math.prod(shape)
    whole = np.arange(size).reshape(shape)
    for begin in range(size + 1):
        for end in range(begin, size + 1):
            found = list(rectangles(shape, begin, end))
            pieces = [
                whole[tuple(slice(offset, offset + count) for offset, count in zip(offsets, sizes, strict=True))]
                for offsets, sizes in found
            ]
            assert all(piece.shape == sizes for piece, (_, sizes) in zip(pieces, found, strict=True))
            assert np.concatenate([[], *(piece.reshape(-1) for piece in pieces)]).tolist() == list(range(begin, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)


def test_large_slices_take_no_longer():
    generator = random.Random(0)
    shape = (4096, 14336)
    for _ in range(1000):
        begin, end = sorted(generator.randrange(math.prod(shape) + 1) for _ in range(2))
        assert sum(math.prod(sizes) for _, sizes in rectangles(shape, begin, end)) == end - begin
