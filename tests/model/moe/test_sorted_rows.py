"""Rows of the first expert and of the others, which may share some, against padding with zeros in float64."""

import pytest
import torch

from megatron_moe_lpr.model.moe.sorted_rows import SortedRows, join
from megatron_moe_lpr.model.moe.weighted_rows import WeightedRows

ROWS, HIDDEN = 9, 4


@pytest.mark.parametrize(("count", "taken"), [(3, 3), (3, 5), (0, 1), (4, 9)])
@pytest.mark.parametrize("trains", [True, False])
def test_rows_that_are_taken_in_place_of_padding_change_nothing(count, taken, trains):
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    first = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
    other = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
    factors = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    gradient = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)

    def gradients(mixed) -> list[torch.Tensor | None]:
        leaves = [leaf.clone().requires_grad_() for leaf in (given, factors, first, other)]
        leaves[2].requires_grad_(trains)
        mixed(*leaves).backward(gradient)
        return [leaf.grad for leaf in leaves]

    def ours(rows, weights, first, other):
        sorted_rows = SortedRows(rows, weights, torch.empty(0), torch.empty(0), False)
        (own, own_weights), (new, new_weights) = sorted_rows.split(count, taken)
        assert len(own) == taken
        outputs = (own @ first) * own_weights[:, None], (new @ other) * new_weights[:, None]
        return join(*outputs, count, trains)

    def plain(rows, weights, first, other):
        return torch.cat((rows[:count] @ first, rows[count:] @ other)) * weights[:, None]

    for found, expected in zip(gradients(ours), gradients(plain), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_rows(dtype):
    rows = torch.randn(5, HIDDEN).to(dtype).requires_grad_()
    weights = torch.rand(5).requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in (rows, weights)]
    gradient = torch.randn(5, HIDDEN).to(dtype)
    output, expected = WeightedRows.apply(rows, weights, False), exact[0] * exact[1][:, None]
    output.backward(gradient)
    expected.backward(gradient.double())
    assert (output.dtype, rows.grad.dtype, weights.grad.dtype) == (dtype, dtype, torch.float32)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(output.double(), expected, **tolerance)
    torch.testing.assert_close(rows.grad.double(), exact[0].grad, **tolerance)
    torch.testing.assert_close(weights.grad.double(), exact[1].grad, rtol=1e-5, atol=1e-6)
