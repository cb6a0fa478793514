"""Products of several experts in one launch against one product each."""

import pytest
import torch

from megatron_moe_lpr.model.moe import grouped_product
from megatron_moe_lpr.model.moe.grouped_product import GroupedProduct

COUNTS = [[3, 4, 9], [0, 16, 0], [5, 0, 11], [0, 0, 0]]


@pytest.fixture(autouse=True)
def _no_pinned_memory(monkeypatch):
    """Without a device there is none."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def compute(counts: list[int], in_one_launch: bool, frozen: bool = False, split: bool = False) -> list[torch.Tensor]:
    """Output and gradients in bf16 for three experts of 16 x 24; `split`: their matrices lie apart."""
    generator = torch.Generator().manual_seed(1)
    rows, stack, gradient = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((sum(counts), 24), (3, 16, 24), (sum(counts), 16))
    )
    rows.requires_grad_()
    weights = [(matrix.clone() if split else matrix).requires_grad_(not frozen) for matrix in stack]
    output = GroupedProduct.apply(rows, counts, in_one_launch, *weights)
    output.backward(gradient)
    return [output.detach(), rows.grad, *([] if frozen else [weight.grad for weight in weights])]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("frozen", "split"), [(False, False), (False, True), (True, False)])
def test_one_launch_or_one_each(counts, frozen, split, monkeypatch):
    calls = []
    original = grouped_product.grouped_mm
    monkeypatch.setattr(grouped_product, "grouped_mm", lambda *given: (calls.append(1), original(*given))[1])
    expected, found = (compute(counts, grouped, frozen, split) for grouped in (False, True))
    # Output, gradient of the rows, gradients of the matrices.
    assert len(calls) == (0 if not sum(counts) else 2 * (not split) + (not frozen))
    assert len(expected) == len(found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.02)


def test_an_expert_without_rows_gets_zeros_and_leaves_the_buffer():
    rows, stack = torch.ones(4, 8).bfloat16(), torch.ones(2, 8, 8).bfloat16()
    weights = [matrix.requires_grad_() for matrix in stack]
    for weight in weights:
        weight.main_grad = torch.full((8, 8), 2.0)
    GroupedProduct.apply(rows, [0, 4], True, *weights).sum().backward()
    assert torch.equal(weights[0].main_grad, torch.full((8, 8), 2.0))
    assert torch.equal(weights[1].main_grad, torch.full((8, 8), 6.0))


@pytest.mark.parametrize("in_one_launch", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_rows_are_kept_for_weights_that_train_alone(trains, in_one_launch):
    kept = []
    rows, stack = torch.ones(4, 8, requires_grad=True), torch.ones(2, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: (kept.append(tuple(saved.shape)), saved)[1], id):
        GroupedProduct.apply(rows, [1, 3], in_one_launch, *(matrix.requires_grad_(trains) for matrix in stack))
    assert ((4, 8) in kept) == trains


def test_rows_that_do_not_fill_16_bytes_are_multiplied_one_by_one(monkeypatch):
    monkeypatch.setattr(grouped_product, "grouped_mm", None)
    rows, weights = torch.ones(4, 6).bfloat16(), list(torch.ones(2, 8, 6).bfloat16())
    assert torch.equal(GroupedProduct.apply(rows, [1, 3], True, *weights), torch.full((4, 8), 6.0).bfloat16())
