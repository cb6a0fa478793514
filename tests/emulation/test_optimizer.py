"""Kernels over lists of tensors: Adam against torch's own in float64, scaling, norms, scales of weights."""

import math

import pytest
import torch

from tests.emulation.builders import E4M3
from tests.emulation.fp8 import scale_for
from tests.emulation.kernels import KernelRefuses
from tests.emulation.table import TABLE

CHUNK = 65536
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3}


@pytest.fixture
def flag():
    return torch.zeros(1, dtype=torch.int32)


def step_all(tex, flag, lists, step: int, mode: int) -> None:
    beta1, beta2 = SETTINGS["betas"]
    decay = SETTINGS["weight_decay"]
    tex.multi_tensor_adam(CHUNK, flag, lists, SETTINGS["lr"], beta1, beta2, SETTINGS["eps"], step, mode, 1, decay)


@pytest.mark.parametrize(("mode", "reference"), [(1, torch.optim.AdamW), (0, torch.optim.Adam)])
@pytest.mark.parametrize("masters", [False, True])
def test_adam(mode, reference, masters, flag, tex):
    """Three steps of two tensors; in bf16 with fp32 copies, which alone are exact."""
    shapes = ((5, 3), (7,))
    exact = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    full = [tensor.detach().float() for tensor in exact]
    optimizer = reference(exact, **SETTINGS)
    firsts, seconds = ([torch.zeros(shape) for shape in shapes] for _ in range(2))
    parameters = [tensor.bfloat16() for tensor in full] if masters else full
    for step in range(1, 4):
        gradients = [torch.randn(shape) for shape in shapes]
        for tensor, gradient in zip(exact, gradients, strict=True):
            tensor.grad = gradient.double()
        optimizer.step()
        step_all(tex, flag, [gradients, parameters, firsts, seconds, *([full] if masters else [])], step, mode)
    for tensor, found, rounded in zip(exact, full, parameters, strict=True):
        torch.testing.assert_close(found.double(), tensor.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(rounded, found.to(rounded.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_on_the_bits_that_bf16_lacks(dtype, flag, tex):
    """Three steps in fp32 of numbers of which only halves are kept: to the bit those of whole fp32 parameters."""
    if dtype == torch.bfloat16 and not TABLE.at_least("2.17"):
        pytest.skip("2.11's kernel takes moments in fp32 only; Transformer Engine casts them before")
    whole = torch.randn(40)
    lower = whole.view(torch.int16)[0::2].clone()
    upper = (whole.view(torch.int16)[1::2] + (lower < 0).to(torch.int16)).view(torch.bfloat16)
    rounded = whole.bfloat16()
    assert torch.equal(upper, rounded)
    kept, expected = ([torch.zeros(40, dtype=dtype) for _ in range(2)] for _ in range(2))
    beta1, beta2 = SETTINGS["betas"]
    for step in range(1, 4):
        gradient = torch.randn(40)
        step_all(tex, flag, [[gradient], [rounded], *([moment] for moment in expected), [whole]], step, 1)
        settings = (SETTINGS["lr"], beta1, beta2, SETTINGS["eps"], step, 1, 1, SETTINGS["weight_decay"])
        lists = [[gradient], [upper], *([moment] for moment in kept), [lower]]
        tex.multi_tensor_adam_param_remainder(CHUNK, flag, lists, *settings)
        assert torch.equal(lower, whole.view(torch.int16)[0::2])
        assert torch.equal(upper, rounded)
        assert all(torch.equal(found, moment) for found, moment in zip(kept, expected, strict=True))


@pytest.mark.parametrize(("which", "dtype"), [(1, torch.float32), (3, torch.float16), (4, torch.float32)])
def test_adam_on_bits_refuses_other_types(which, dtype, flag, tex):
    lists = [[torch.ones(4)], [torch.ones(4).bfloat16()], [torch.zeros(4)], [torch.zeros(4)], [torch.zeros(4).short()]]
    lists[which] = [torch.zeros(4, dtype=dtype)]
    with pytest.raises(KernelRefuses, match=r"(parameter|remainder) is|moments are"):
        tex.multi_tensor_adam_param_remainder(CHUNK, flag, lists, 0.1, 0.9, 0.95, 1e-8, 1, 1, 1, 0.0)


def test_adam_lets_infinities_through_whatever_the_flag_says(flag, tex):
    """As the kernel says of itself; Megatron looks at the gradients before it steps."""
    flag.fill_(1)
    lists = [[torch.tensor([1.0, math.inf])], [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)]]
    step_all(tex, flag, lists, 1, 1)
    assert lists[1][0][0] < 1 and not lists[1][0][1].isfinite()


def test_scaling_and_what_is_not_finite(flag, tex):
    source, target = [torch.randn(5), torch.randn(3).bfloat16()], [torch.empty(5), torch.empty(3)]
    tex.multi_tensor_scale(CHUNK, flag, [source, target], 0.25)
    for before, after in zip(source, target, strict=True):
        assert torch.equal(after, before.float() * 0.25)
    assert flag == 0
    source[0][2] = math.nan
    tex.multi_tensor_scale(CHUNK, flag, [source, target], 1.0)
    assert flag == 1


@pytest.mark.skipif(not TABLE.at_least("2.17"), reason="2.11 has no such function")
def test_scaling_by_a_factor_on_the_device(flag, tex):
    source, target = [torch.randn(5)], [torch.empty(5)]
    tex.multi_tensor_scale_tensor(CHUNK, flag, [source, target], torch.tensor([0.25]))
    assert torch.equal(target[0], source[0] * 0.25)
    with pytest.raises(KernelRefuses, match="one fp32 factor"):
        tex.multi_tensor_scale_tensor(CHUNK, flag, [source, target], torch.ones(2))


@pytest.mark.parametrize("per_tensor", [False, True])
def test_norms(per_tensor, flag, tex):
    tensors = [torch.randn(50), torch.randn(3, 4).bfloat16()]
    whole, each = tex.multi_tensor_l2norm(CHUNK, flag, [tensors], per_tensor)
    exact = [tensor.double().norm() for tensor in tensors]
    torch.testing.assert_close(whole.double(), torch.stack(exact).norm()[None], rtol=1e-6, atol=0)
    unscaled, _ = tex.multi_tensor_unscale_l2norm(CHUNK, flag, [tensors], torch.tensor([0.5]), per_tensor)
    torch.testing.assert_close(unscaled, whole * 0.5)
    if per_tensor:
        torch.testing.assert_close(each.double(), torch.stack(exact), rtol=1e-6, atol=0)
    else:
        assert each.numel() == 0


@pytest.mark.parametrize("powers", [False, True])
def test_scales_of_weights(powers, flag, tex):
    amaxes = [torch.tensor([3.0]), torch.tensor([0.0])]
    scales, inverses = ([torch.empty(1) for _ in amaxes] for _ in range(2))
    tex.multi_tensor_compute_scale_and_scale_inv(CHUNK, flag, [amaxes, scales, inverses], 448.0, powers, 0.0)
    assert torch.equal(torch.cat(scales), scale_for(torch.cat(amaxes), E4M3, powers, 0.0))
    assert torch.cat(scales).tolist() == [128.0 if powers else torch.tensor(448 / 3).item(), 1.0]
    assert torch.equal(torch.cat(inverses), 1 / torch.cat(scales))


def test_refusals(flag, tex):
    for lists, message in (
        ([[torch.ones(2)], [torch.ones(3)]], "tensors of different sizes"),
        ([[torch.ones(2, 3).t()], [torch.ones(3, 2)]], "not contiguous"),
    ):
        with pytest.raises(KernelRefuses, match=message):
            tex.multi_tensor_scale(CHUNK, flag, lists, 1.0)
    with pytest.raises(ValueError, match="zip"):
        tex.multi_tensor_scale(CHUNK, flag, [[torch.ones(2)], []], 1.0)
    for kernel, rest in (
        (tex.multi_tensor_l2norm, (None,)),
        (tex.multi_tensor_unscale_l2norm, (torch.ones(1), None)),
        (tex.multi_tensor_scale, (1.0,)),
    ):
        with pytest.raises(KernelRefuses, match=r"the flag is torch\.float32, int32 is expected"):
            kernel(CHUNK, torch.zeros(1), [[torch.ones(2)], [torch.ones(2)]], *rest)
    with pytest.raises(KernelRefuses, match="multi_tensor_adam: 2 lists"):
        step_all(tex, flag, [[torch.ones(2)], [torch.ones(2)]], 1, 1)
