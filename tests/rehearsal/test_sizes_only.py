"""Sizes of large tensors without their values, whole numbers with them, and the memory that is counted."""

import torch

from megatron_moe_lpr.rehearsal.sizes_only import LARGE, SizesOnly
from megatron_moe_lpr.rehearsal.storages import StorageLog

ROWS, WIDTH = 4 * LARGE // 64, 64


def test_large_tensors_have_sizes_and_small_ones_values():
    with SizesOnly(StorageLog()):
        large = torch.full((ROWS, WIDTH), 2.0, dtype=torch.bfloat16)
        product = torch.mm(large, torch.ones(WIDTH, 3, dtype=torch.bfloat16))
        assert product.shape == (ROWS, 3) and product.dtype == torch.bfloat16
        assert large.sum() == 1 and large.float().dtype == torch.float32
        large.mul_(3)  # nothing is written
        assert large.view(-1)[:WIDTH].untyped_storage().data_ptr() == large.untyped_storage().data_ptr()
        assert torch.full((3,), 2.0).sum() == 6
        # Whole numbers and truth values, however many.
        numbers = torch.arange(4 * LARGE) % 5
        assert (numbers == 4).sum() == (4 * LARGE) // 5
        assert torch.randn(4).masked_select(torch.tensor([True, False, True, True])).shape == (3,)
    assert not ((large == 2) | (large == 6)).all(), "values were computed"


def test_nothing_is_read_from_memory_that_nothing_was_written_to():
    """A small view of a large tensor: what lies there may be left from anything that was freed before."""
    left = torch.full((ROWS, WIDTH), torch.nan)
    with SizesOnly(StorageLog()):
        assert (left[0] * 2).tolist() == [1] * WIDTH and left[0].norm() == 1
        small = torch.zeros(WIDTH)
        small.copy_(left[0])
    assert small.isfinite().all()


def test_a_backward_pass_has_gradients_of_the_right_size():
    with SizesOnly(StorageLog()):
        weight = torch.nn.Parameter(torch.empty(WIDTH, 2 * WIDTH))
        rows = torch.empty(ROWS, WIDTH, requires_grad=True)
        torch.nn.functional.silu(rows @ weight).sum().backward()
    assert weight.grad.shape == weight.shape and rows.grad.shape == rows.shape


def test_the_peak_is_what_lived_at_once():
    """Of two tensors that live one after the other one counts, of a view nothing, and the label names this file's
    caller in the package."""
    log, size = StorageLog(), ROWS * WIDTH * 4
    with SizesOnly(log):
        kept = torch.empty(ROWS, WIDTH)
        assert log.restart() == size
        for _ in range(3):
            passing = kept + 1
            assert passing[1:].shape == (ROWS - 1, WIDTH)
            del passing
        assert log.peak == 2 * size
        first, second = kept + 1, kept + 2
        assert log.peak == 3 * size and sum(log.at_peak.values()) == 3 * size and log.at_peak[""] >= size
        del first, second
        assert log.restart() == size
        freed = kept.clone()
        freed.untyped_storage().resize_(0)
        assert sum(log.live().values()) == size
    assert kept.shape == (ROWS, WIDTH)


def test_everything_is_computed_where_asked():
    mode = SizesOnly(StorageLog())
    with mode:
        large = torch.empty(ROWS, WIDTH)
        with mode.computing():
            large.fill_(2.0)
            assert large.sum() == 2 * ROWS * WIDTH
    with SizesOnly(StorageLog(), computes=True):
        assert torch.ones(ROWS, WIDTH).sum() == ROWS * WIDTH
