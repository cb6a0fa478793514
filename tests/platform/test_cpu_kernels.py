"""The CPU's own functions against the plain formulas in float64, forward and backward."""

import pytest
import torch
from torch.nn import functional

from megatron_moe_lpr.model.grouped_linear import _GroupedProduct
from megatron_moe_lpr.model.norm import _RootMeanSquareNorm
from megatron_moe_lpr.platform.cpu.activations import SwiGLU
from megatron_moe_lpr.platform.cpu.rotary import Rotation, angles

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


def test_swiglu():
    agree(lambda states: SwiGLU.apply(states, None), plain_swiglu, random(7, 20))
    agree(SwiGLU.apply, plain_swiglu, random(7, 20), torch.rand(7, 1, generator=generator))


def test_swiglu_without_rows():
    agree(SwiGLU.apply, plain_swiglu, random(0, 20), random(0, 1))


def test_swiglu_in_bf16_keeps_the_dtypes():
    states, weights = random(7, 20).bfloat16().requires_grad_(), random(7, 1).requires_grad_()
    SwiGLU.apply(states, weights).sum().backward()
    assert states.grad.dtype == torch.bfloat16
    assert weights.grad.dtype == torch.float32


def test_rotation():
    frequencies = torch.arange(9.0)[:, None] * torch.rand(4, generator=generator)
    frequencies = torch.cat((frequencies, frequencies), dim=-1)[:, None, None, :]

    def formula(states):
        first, second = states.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return 1.5 * (states * frequencies.double().cos() + turned * frequencies.double().sin())

    agree(lambda states: Rotation.apply(states, *angles(frequencies, 1.5, states.dtype)), formula, random(9, 2, 3, 8))


def test_rotation_of_a_view():
    """Megatron rotates slices of one tensor of queries, keys and values."""
    frequencies = torch.rand(9, 1, 1, 4, generator=generator).repeat(1, 1, 1, 2)
    states = random(9, 2, 3, 24)[..., 8:16]
    cosines, sines = angles(frequencies, 1.0, torch.float32)
    torch.testing.assert_close(Rotation.apply(states, cosines, sines), Rotation.apply(states.clone(), cosines, sines))


def test_norm():
    def formula(states, weight):
        return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    agree(lambda states, weight: _RootMeanSquareNorm.apply(states, weight, 1e-6), formula, random(5, 3, 16), random(16))


def test_norm_rounds_once_in_bf16():
    states, weight = random(5, 16).bfloat16(), random(16).bfloat16()
    expected = functional.rms_norm(states.double(), (16,), weight.double(), 1e-6).bfloat16()
    torch.testing.assert_close(_RootMeanSquareNorm.apply(states, weight, 1e-6), expected, rtol=0, atol=0)


@pytest.mark.parametrize("counts", [[3, 4], [0, 7], [7, 0]])
def test_grouped_product(counts):
    def function(tokens, first, second):
        return _GroupedProduct.apply(tokens, counts, first, second)

    def formula(tokens, first, second):
        pieces = tokens.split(counts)
        return torch.cat((pieces[0] @ first.T, pieces[1] @ second.T))

    agree(function, formula, random(7, 6), random(5, 6), random(5, 6))
