"""The CPU's own functions against the plain formulas in float64, forward and backward."""

import pytest
import torch
from torch.nn import functional

from megatron_moe_lpr.model.moe.grouped_product import GroupedProduct
from megatron_moe_lpr.platform.cpu.expert_rows import _Pad, _Unpad, bucket_size
from megatron_moe_lpr.platform.torch_only.optimizer import FusedAdam, _scale

generator = torch.Generator().manual_seed(5)


def random(*shape):
    return torch.randn(shape, generator=generator)


def agree(function, formula, *inputs):
    """Output and the gradient of every float input."""
    single = [value.clone().requires_grad_() for value in inputs]
    double = [value.double().requires_grad_() for value in inputs]
    found, expected = function(*single), formula(*double)
    gradient = random(*found.shape)
    found.backward(gradient)
    expected.backward(gradient.double())
    torch.testing.assert_close(found, expected.float(), rtol=2e-6, atol=2e-6)
    for one, other in zip(single, double, strict=True):
        torch.testing.assert_close(one.grad, other.grad.float(), rtol=1e-5, atol=1e-5)


def plain_swiglu(gate_and_up, weights=None):
    gate, up = gate_and_up.chunk(2, dim=-1)
    return functional.silu(gate) * up * (1 if weights is None else weights)


@pytest.mark.parametrize("counts", [[3, 4], [0, 7], [7, 0]])
def test_grouped_product(counts):
    def function(tokens, first, second):
        return GroupedProduct.apply(tokens, counts, False, first, second)

    def formula(tokens, first, second):
        pieces = tokens.split(counts)
        return torch.cat((pieces[0] @ first.T, pieces[1] @ second.T))

    agree(function, formula, random(7, 6), random(5, 6), random(5, 6))


def test_grouped_product_adds_to_the_optimizers_buffer():
    tokens, gradient = random(7, 6), random(7, 5)
    weights = [random(5, 6).requires_grad_() for _ in range(2)]
    GroupedProduct.apply(tokens, [3, 4], False, *weights).backward(gradient)
    expected = [weight.grad.clone() for weight in weights]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        rounded_weights = [weight.detach().to(dtype).requires_grad_() for weight in weights]
        for weight in rounded_weights:
            weight.main_grad = torch.ones(5, 6)
        for _ in range(2):
            GroupedProduct.apply(tokens.to(dtype), [3, 4], False, *rounded_weights).backward(gradient.to(dtype))
        for weight, value in zip(rounded_weights, expected, strict=True):
            assert weight.grad_added_to_main_grad
            torch.testing.assert_close(weight.main_grad, 1 + 2 * value, rtol=tolerance, atol=tolerance)


def test_buckets_are_few_and_hardly_larger():
    numbers = [bucket_size(rows) for rows in range(4097)]
    assert all(rows <= number < max(rows + 32, rows * 17 / 16) for rows, number in enumerate(numbers) if rows)
    assert numbers[0] == 0
    assert numbers == sorted(numbers)
    assert len(set(numbers[2048:4096])) <= 17
    assert len(set(numbers[1:513])) == 16


def test_padded_rows_and_back():
    counts, longer = [3, 0, 4], [4, 0, 6]

    def spread(rows):
        zeros = [rows.new_zeros(more - count, 5) for count, more in zip(counts, longer, strict=True)]
        pairs = zip(rows.split(counts), zeros, strict=True)
        return torch.cat([piece for pair in pairs for piece in pair])

    agree(lambda rows: _Pad.apply(rows, counts, longer), spread, random(7, 5))
    agree(lambda rows: _Unpad.apply(rows, counts, longer), lambda rows: rows[[0, 1, 2, 4, 5, 6, 7]], random(10, 5))


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_fused_adam(adam_w_mode):
    plain = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    weights = random(7, 5)
    single, double = weights.clone().requires_grad_(), weights.double().requires_grad_()
    fused = FusedAdam([single], adam_w_mode=adam_w_mode, lr=0.01, weight_decay=0.1)
    reference = plain([double], lr=0.01, weight_decay=0.1, foreach=False)
    for _ in range(3):
        single.grad = random(7, 5)
        double.grad = single.grad.double()
        fused.step()
        reference.step()
    torch.testing.assert_close(single, double.float(), rtol=1e-5, atol=1e-6)


def test_scaling_in_place_and_to_another_dtype():
    values, target = random(6), torch.empty(6, dtype=torch.bfloat16)
    expected = values * 0.5
    _scale(0, None, [[values], [target]], 0.5)
    assert torch.equal(target, expected.bfloat16())
    _scale(0, None, [[values], [values]], 0.5)
    assert torch.equal(values, expected)
